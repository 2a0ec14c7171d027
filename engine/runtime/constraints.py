"""Holds an answer to a JSON schema, a regular expression or a grammar: which tokens may come next.

`Compiler` is used off the step thread: it turns a constraint into a `Matcher`, keeps the latest ones, and refuses what
is wrong or too large with `ConstraintError`. The step thread asks the matcher for a mask before each draw and tells it
the token that was drawn. The automata are llguidance's; every limit of theirs is set here, since schemas and grammars
come from strangers.
"""

from __future__ import annotations

import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark

Mask = npt.NDArray[np.uint32]
Kind = Literal["json_schema", "regex", "grammar"]

log = logging.getLogger("autoglm.engine")

MAX_MESSAGE = 500


class ConstraintError(ValueError):
    """Change the request: its constraint is wrong, too large, or not what this model can be held to."""


@dataclass(frozen=True, slots=True)
class Constraint:
    """What an answer must be. A grammar is in Lark's or GBNF's notation; an empty JSON schema means any object."""

    kind: Kind
    text: str


@dataclass(frozen=True, slots=True)
class CompilerLimits:
    """Bounds of one constraint and of the cache."""

    max_bytes: int = 65_536
    max_symbols: int = 50_000
    compile_fuel: int = 1_000_000
    """Work to build the lexer; about 50,000 a millisecond."""
    step_fuel: int = 200_000
    """Work for one mask; about 14,000 a millisecond."""
    step_items: int = 50_000
    max_states: int = 50_000
    """1 to 2 kB each."""
    cached: int = 64


class Matcher:
    """The state of one answer. Owned by the step thread."""

    def __init__(self, automaton: LLMatcher, words: int) -> None:
        self._automaton = automaton
        self._mask: Mask = np.zeros(words, dtype=np.uint32)

    def mask(self) -> Mask:
        """One bit per token: may it come next? The model's end tokens are in it once the answer may end.

        The array is the matcher's own and is overwritten by the next call.
        """
        with _no_panic():
            self._automaton.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        self._check()
        return self._mask

    def advance(self, token: int) -> None:
        """The token that was drawn. Raises ConstraintError when it may not come here."""
        with _no_panic():
            self._automaton.consume_token(token)
        self._check()

    def allowed(self, tokens: Sequence[int]) -> int:
        """How many of `tokens`, from the first, could follow one another here. Changes nothing."""
        with _no_panic():
            return int(self._automaton.validate_tokens(list(tokens)))

    @property
    def is_complete(self) -> bool:
        """Nothing more can be added."""
        return bool(self._automaton.is_stopped())

    def _check(self) -> None:
        if self._automaton.is_error():
            raise ConstraintError(_brief(self._automaton.get_error()))


class Compiler:
    """Makes matchers for one tokenizer. Safe to use from several threads; `compile` may take as long as its fuel."""

    def __init__(
        self, tokenizer: Callable[[], str], vocab_size: int, end_token_ids: Sequence[int], limits: CompilerLimits
    ) -> None:
        """`tokenizer` gives the text of a Hugging Face tokenizer.json; it is read when first needed."""
        self._read, self._vocab_size, self._ends = tokenizer, vocab_size, list(end_token_ids)
        self._limits = limits
        self._tokenizer: LLTokenizer | None = None
        self._cache: OrderedDict[Constraint, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()
        self._loading = threading.Lock()

    def compile(self, constraint: Constraint, emitted: Sequence[int] = ()) -> Matcher:
        """A matcher at the state after `emitted` (what an earlier stream of the same request has sent already).

        Raises ConstraintError.
        """
        if (size := len(constraint.text.encode())) > self._limits.max_bytes:
            raise ConstraintError(
                f"the {constraint.kind} has {size} bytes, at most {self._limits.max_bytes} are allowed"
            )
        with self._lock:
            pristine = self._cache.get(constraint)
            if pristine is not None:
                self._cache.move_to_end(constraint)
        if pristine is None:
            pristine = self._build(constraint)
            with self._lock:
                self._cache[constraint] = pristine
                while len(self._cache) > self._limits.cached:
                    self._cache.popitem(last=False)
        matcher = Matcher(pristine.deep_copy(), -(-self._vocab_size // 32))
        for token in emitted:
            matcher.advance(token)
        return matcher

    def _build(self, constraint: Constraint) -> LLMatcher:
        limits = LLParserLimits(
            initial_lexer_fuel=self._limits.compile_fuel,
            step_lexer_fuel=self._limits.step_fuel,
            step_max_items=self._limits.step_items,
            max_lexer_states=self._limits.max_states,
            max_grammar_size=self._limits.max_symbols,
            verbose_errors=False,
        )
        vocabulary = self._vocabulary()
        with _no_panic():
            automaton = LLMatcher(vocabulary, _grammar(constraint), log_level=0, limits=limits)
        if automaton.is_error():
            raise ConstraintError(f"{constraint.kind}: {_brief(automaton.get_error())}")
        return automaton

    def _vocabulary(self) -> LLTokenizer:
        with self._loading:
            if self._tokenizer is None:
                try:
                    text = self._read()
                    self._tokenizer = LLTokenizer(text, n_vocab=self._vocab_size, eos_token=self._ends or None)
                except (OSError, ValueError) as error:
                    log.warning("no constraints: the tokenizer cannot be read: %s", error)
                    raise ConstraintError("this model has no tokenizer.json that constraints could use") from None
            return self._tokenizer


def tokenizer_of(model_dir: Path, max_bytes: int = 64 << 20) -> Callable[[], str]:
    """Reads the tokenizer.json of a model directory, within a bound."""

    def read() -> str:
        path = model_dir / "tokenizer.json"
        if (size := path.stat().st_size) > max_bytes:
            raise ValueError(f"{path.name} has {size} bytes, at most {max_bytes} are read")
        return path.read_text(encoding="utf-8")

    return read


def _grammar(constraint: Constraint) -> str:
    text = constraint.text
    try:
        match constraint.kind:
            case "regex":
                return str(LLMatcher.grammar_from_regex(text))
            case "grammar":
                return str(LLMatcher.grammar_from_lark(any_to_lark(text)))
            case "json_schema":
                schema = json.loads(text) if text.strip() else {"type": "object"}
                if schema is True:
                    schema = {}
                if not isinstance(schema, dict):
                    raise ValueError("must be a JSON object")
                # Options inside the schema would override ours; nothing but a schema is accepted.
                schema.pop("x-guidance", None)
                return str(LLMatcher.grammar_from_json_schema(json.dumps(schema)))
    except RecursionError:
        raise ConstraintError(f"{constraint.kind}: nested too deeply") from None
    except Exception as error:  # the notation's own errors have no common type
        raise ConstraintError(f"{constraint.kind}: {_brief(str(error))}") from None


@contextmanager
def _no_panic() -> Iterator[None]:
    """A bug in the library is an error of this one constraint. Its panics are no Exception and would end the thread."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        log.exception("the library of constraints failed")
        raise ConstraintError("it cannot be followed") from None


def _brief(text: str) -> str:
    return text.strip()[:MAX_MESSAGE] or "it cannot be followed"
