"""One model's vocabulary: text to ids with or without special tokens, and the exact bytes behind every id.

Two encoders share the vocabulary. `parsing` reads `<|user|>` and its like as one id, `plain` never does: to it they are
ordinary characters. Which tokens are *control* tokens: all added tokens, whether flagged special or not (`<think>`
often is not), except runs of white space, which some models keep there as ordinary vocabulary. Thread-safe once loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from engine.checkpoints.digests import tokenizer_digest
from engine.checkpoints.errors import CheckpointError
from engine.checkpoints.gguf_tokenizer import read_text_files
from services.tokenizer.token_bytes import DecoderKind, decoder_kind, token_bytes

MAX_TOKEN_BYTES = 4096
"""Longest single token; the proto's bound for one element of token_bytes."""


class UnusableTokenizer(ValueError):
    """The files cannot be served safely; the text says which and why."""


@dataclass(frozen=True, slots=True)
class ControlToken:
    """A token that only a template, a worker or a caller who asks for it may produce."""

    token_id: int
    text: str
    strips_left: bool
    strips_right: bool


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A loaded tokenizer. `pieces[id]` is the token's own bytes, None where the id does not exist."""

    digest: str
    pieces: Sequence[bytes | None]
    special_ids: frozenset[int]
    controls: Mapping[str, ControlToken]
    drops_leading_space: bool
    parsing: Any  # tokenizers.Tokenizer carries no types
    plain: Any
    plain_continuation: Any

    @property
    def size(self) -> int:
        """Entries, holes included: one more than the largest id."""
        return len(self.pieces)

    def encode(self, text: str, *, parse_special: bool = False, add_special: bool = False) -> list[int]:
        """Ids of `text`; `add_special` puts the model's own prefix (and suffix) around them."""
        encoder = self.parsing if parse_special else self.plain
        ids: list[int] = encoder.encode(text, add_special_tokens=add_special).ids
        return ids

    def encode_run(self, text: str, *, is_first: bool) -> list[int]:
        """Ids of a stretch of plain text between control tokens, as the whole prompt would have encoded it."""
        encoder = self.plain if is_first else self.plain_continuation
        ids: list[int] = encoder.encode(text, add_special_tokens=False).ids
        return ids


def load(directory: Path, max_file_bytes: int) -> Vocabulary:
    """Reads `tokenizer.json` of a model directory, or the tokenizer in a .gguf file. Raises UnusableTokenizer."""
    path = directory if directory.suffix == ".gguf" else directory / "tokenizer.json"
    try:
        source = _source(path, max_file_bytes)
        parsing = _build(source)
        controls = _controls(source)
        plain_source = _without_parsing(source, controls)
        plain = _build(plain_source)
        plain.encode_special_tokens = True
        continuation_source = _without_prefix(plain_source)
        continuation = plain
        if continuation_source != plain_source:
            continuation = _build(continuation_source)
            continuation.encode_special_tokens = True
        kind = decoder_kind(source.get("decoder"))
    except UnusableTokenizer:
        raise
    except CheckpointError as error:  # names the file itself
        raise UnusableTokenizer(str(error)) from None
    except Exception as error:  # `tokenizers` raises bare Exception for a malformed file
        raise UnusableTokenizer(f"{path}: {error}") from None
    for control in controls.values():
        for encoder in (plain, continuation):
            if control.token_id in encoder.encode(control.text, add_special_tokens=False).ids:
                raise UnusableTokenizer(f"{path}: {control.text!r} cannot be written as plain text")
    return Vocabulary(
        digest=tokenizer_digest(directory),
        pieces=_pieces(parsing, source, kind, path),
        special_ids=frozenset(int(t["id"]) for t in source.get("added_tokens", []) if t.get("special")),
        controls=controls,
        drops_leading_space=kind.drops_leading_space,
        parsing=parsing,
        plain=plain,
        plain_continuation=continuation,
    )


def _source(path: Path, max_file_bytes: int) -> dict[str, Any]:
    if path.suffix == ".gguf":
        return read_text_files(path).tokenizer
    if (size := path.stat().st_size) > max_file_bytes:
        raise UnusableTokenizer(f"{path}: {size} bytes, at most {max_file_bytes} are allowed")
    source: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return source


def _build(source: Mapping[str, Any]) -> Any:
    tokenizer = Tokenizer.from_str(json.dumps(source))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _controls(source: Mapping[str, Any]) -> dict[str, ControlToken]:
    return {
        token["content"]: ControlToken(
            int(token["id"]), token["content"], bool(token.get("lstrip")), bool(token.get("rstrip"))
        )
        for token in source.get("added_tokens", [])
        if token["content"] and not token["content"].isspace()
    }


def _without_parsing(source: Mapping[str, Any], controls: Mapping[str, ControlToken]) -> dict[str, Any]:
    """The same tokenizer with every control token flagged special, which `encode_special_tokens` then reads as text."""
    added = [
        {**token, "special": True} if token["content"] in controls else token
        for token in source.get("added_tokens", [])
    ]
    return {**source, "added_tokens": added}


def _without_prefix(source: dict[str, Any]) -> dict[str, Any]:
    """For text after a control token: a Metaspace that marks only the first word of the whole prompt marks none."""

    def never(part: Any) -> Any:
        if isinstance(part, dict) and part.get("type") == "Metaspace" and part.get("prepend_scheme") == "first":
            return {**part, "prepend_scheme": "never"}
        if isinstance(part, dict) and part.get("type") == "Sequence":
            return {**part, "pretokenizers": [never(each) for each in part.get("pretokenizers", [])]}
        return part

    return {**source, "pre_tokenizer": never(source.get("pre_tokenizer"))}


def _pieces(tokenizer: Any, source: Mapping[str, Any], kind: DecoderKind, path: Path) -> list[bytes | None]:
    vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    if not vocabulary:
        raise UnusableTokenizer(f"{path}: the vocabulary is empty")
    largest = max(vocabulary.values())
    if largest >= 2_000_000:
        raise UnusableTokenizer(f"{path}: token id {largest} is out of range")
    added = {token["content"] for token in source.get("added_tokens", [])}
    pieces: list[bytes | None] = [None] * (largest + 1)
    for text, number in vocabulary.items():
        piece = token_bytes(text, kind, is_added=text in added)
        if len(piece) > MAX_TOKEN_BYTES:
            raise UnusableTokenizer(f"{path}: token {number} has {len(piece)} bytes, more than {MAX_TOKEN_BYTES}")
        pieces[number] = piece
    return pieces
