"""Answers held to a schema, a regular expression or a grammar; bad or monstrous constraints are refused quickly."""

from __future__ import annotations

import json
import time

import jsonschema
import numpy as np
import pytest

from engine.runtime.constraints import Compiler, CompilerLimits, Constraint, ConstraintError, Matcher
from tests.fakes.small_tokenizer import END, text_of, tokenizer_json, tokens_of

TOKENIZER = tokenizer_json()
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["ada", "bob"]}, "age": {"type": "integer", "minimum": 0, "maximum": 120}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def compiler(**limits: int) -> Compiler:
    return Compiler(lambda: TOKENIZER, 97, [END], CompilerLimits(**limits))


def allowed(matcher: Matcher) -> list[int]:
    bits = np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")
    return [int(token) for token in np.flatnonzero(bits)]


def spell(matcher: Matcher, chooser: np.random.Generator, most: int = 200) -> str:
    """A random text the matcher allows."""
    made: list[int] = []
    while not matcher.is_complete and len(made) < most:
        token = int(chooser.choice(allowed(matcher)))
        if token == END:
            break
        matcher.advance(token)
        made.append(token)
    return text_of(made)


def test_every_text_a_schema_allows_is_valid() -> None:
    """Random walks under the mask end in JSON that the schema accepts."""
    source = compiler()
    constraint = Constraint("json_schema", json.dumps(SCHEMA))
    for seed in range(20):
        matcher = source.compile(constraint)
        chooser = np.random.default_rng(seed)
        text = spell(matcher, chooser, 2000)
        assert matcher.is_complete or END in allowed(matcher), text
        jsonschema.validate(json.loads(text), SCHEMA)


@pytest.mark.parametrize(
    ("constraint", "good", "bad"),
    [
        (Constraint("regex", "[a-c]{2}[0-9]+"), "ab123", "abc"),
        (Constraint("grammar", 'start: "yes" | "no"'), "yes", "maybe"),
        (Constraint("grammar", 'root ::= "yes" | "no" ws\nws ::= [ ]'), "no ", "no!"),
        (Constraint("json_schema", ""), '{"a": [1, null]}', "[1]"),
        (Constraint("json_schema", '{"type": "object", "x-guidance": {"lenient": true}}'), "{}", "1"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_fits_is_allowed_and_what_does_not_is_not(constraint: Constraint, good: str, bad: str) -> None:
    """Each notation: a fitting text passes token by token and may end; another one is refused at its fault."""
    source = compiler()
    assert source.compile(constraint).allowed(tokens_of(good)) == len(good)
    matcher = source.compile(constraint, tokens_of(good))
    assert matcher.is_complete or END in allowed(matcher)
    with pytest.raises(ConstraintError):
        source.compile(constraint, tokens_of(bad))


def test_a_resumed_matcher_is_where_the_first_one_was() -> None:
    """Fed with what was emitted, it allows exactly what the undisturbed one allows."""
    source = compiler()
    constraint = Constraint("json_schema", json.dumps(SCHEMA))
    whole = tokens_of('{"name": "ada", "age": 36}')
    undisturbed = source.compile(constraint)
    for cut, token in enumerate(whole):
        assert allowed(source.compile(constraint, whole[:cut])) == allowed(undisturbed)
        undisturbed.advance(token)


@pytest.mark.parametrize(
    "constraint",
    [
        Constraint("regex", "a["),
        Constraint("json_schema", '{"type": "nope"}'),
        Constraint("json_schema", "[1]"),
        Constraint("json_schema", "{"),
        Constraint("json_schema", '{"$ref": "https://example.org/schema"}'),
        Constraint("json_schema", '{"a":' * 5000 + "1" + "}" * 5000),
        Constraint("grammar", "start: missing"),
        Constraint("grammar", ""),
        Constraint("grammar", 'root ::= ("a"'),
        Constraint("regex", "(" * 3000),
        Constraint("regex", "(a|b)*a(a|b){3000}(a|b){3000}"),
        Constraint("regex", "x" * 70_000),
        Constraint("json_schema", json.dumps({"type": "string", "pattern": "(.*a.*b){200}(.*c){200}"})),
        Constraint("json_schema", json.dumps({"anyOf": [{"minLength": n, "maxLength": 9 * n} for n in range(2000)]})),
    ],
    ids=lambda value: value.text[:24],
)
def test_a_bad_constraint_is_a_typed_error_within_its_budget(constraint: Constraint) -> None:
    """Wrong, remote, nested or huge: ConstraintError at once, or a matcher whose masks stay within their fuel."""
    started = time.monotonic()
    try:
        matcher = compiler().compile(constraint)
        spell(matcher, np.random.default_rng(0), 5)
    except ConstraintError as error:
        assert 0 < len(str(error)) < 700
    else:
        assert constraint.text.startswith(("(a|b)", '{"type": "string"', '{"anyOf"')), "it should have been refused"
    assert time.monotonic() - started < 20, "a budget was not kept"


def test_the_cache_is_bounded_and_its_matchers_are_independent() -> None:
    """Two answers under one constraint do not move each other; old constraints are forgotten."""
    source = compiler(cached=2)
    one, two = (source.compile(Constraint("regex", "[0-9]{3}")) for _ in range(2))
    one.advance(tokens_of("1")[0])
    assert one.allowed(tokens_of("123")) == 2 and two.allowed(tokens_of("123")) == 3
    for number in range(5):
        source.compile(Constraint("regex", f"a{number}"))
    assert len(source._cache) == 2


class PanicException(BaseException):
    """Named as what a panic inside the library becomes."""


class Broken:
    """An automaton with a bug."""

    def consume_token(self, token: int) -> None:
        raise PanicException("planted")

    unsafe_compute_mask_ptr = validate_tokens = consume_token


def test_a_bug_in_the_library_is_an_error_of_its_constraint() -> None:
    """Its panics are no Exception; uncaught, one would end the thread that everyone depends on."""
    matcher = Matcher(Broken(), 4)  # type: ignore[arg-type]
    for call in (lambda: matcher.advance(1), lambda: matcher.allowed([1])):
        with pytest.raises(ConstraintError):
            call()


def test_without_a_tokenizer_there_are_no_constraints() -> None:
    """A model whose tokenizer cannot be read refuses them by name."""

    def missing() -> str:
        raise FileNotFoundError("tokenizer.json")

    with pytest.raises(ConstraintError, match="tokenizer"):
        Compiler(missing, 97, [END], CompilerLimits()).compile(Constraint("regex", "a"))
    with pytest.raises(ConstraintError, match="tokenizer"):
        Compiler(lambda: "{}", 97, [END], CompilerLimits()).compile(Constraint("regex", "a"))
