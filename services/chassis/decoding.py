"""Ids to text, all at once or as they come. Both ways share one path, so a stream's parts always join to the whole.

The tokenizer decodes for whoever asks; the gateway holds a model's `Spelling` and decodes by itself, so that no token
of an answer takes the way to the tokenizer and back. Bytes that form no character become U+FFFD as soon as that is
certain; an unfinished character is held back. The price per token is constant: nothing is decoded twice.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol


class Spelled(Protocol):
    """What decoding needs of a vocabulary."""

    @property
    def pieces(self) -> Sequence[bytes | None]:
        """`pieces[id]` is the token's own bytes, None where the id does not exist."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that no text shows unless special tokens are kept."""

    @property
    def drops_leading_space(self) -> bool:
        """Whether one leading space of a text is dropped."""


@dataclass(frozen=True, slots=True)
class Spelling:
    """A vocabulary's bytes alone, as another service tells them."""

    digest: str
    pieces: Sequence[bytes | None]
    special_ids: frozenset[int]
    drops_leading_space: bool


class TextDecoder:
    """Decodes one stream. `push` and then, once, `finish`; ids must be in the vocabulary."""

    def __init__(self, spelled: Spelled, keep_special: bool) -> None:
        self._pieces = spelled.pieces
        self._skipped = frozenset[int]() if keep_special else spelled.special_ids
        self._drops_space = spelled.drops_leading_space
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Sequence[int]) -> str:
        """Text that is certain now."""
        data = b"".join(self._bytes(ids))
        if self._drops_space and data:
            data = data.removeprefix(b" ")
            self._drops_space = False
        return self._decoder.decode(data)

    def finish(self) -> str:
        """What was held back, as U+FFFD; usually empty."""
        return self._decoder.decode(b"", final=True)

    def _bytes(self, ids: Sequence[int]) -> Iterator[bytes]:
        pieces, skipped = self._pieces, self._skipped
        for number in ids:
            if number not in skipped:
                piece = pieces[number]
                assert piece is not None, number
                yield piece


def decode(spelled: Spelled, ids: Sequence[int], keep_special: bool) -> str:
    """The whole text of `ids`."""
    decoder = TextDecoder(spelled, keep_special)
    return decoder.push(ids) + decoder.finish()


def bytes_of(spelled: Spelled, ids: Sequence[int]) -> list[bytes]:
    """Each token's own bytes, special tokens included."""
    return [piece for number in ids if (piece := spelled.pieces[number]) is not None]


def unknown_id(spelled: Spelled, ids: Sequence[int]) -> int | None:
    """The first id that is not in the vocabulary."""
    pieces, size = spelled.pieces, len(spelled.pieces)
    return next((i for i in ids if i >= size or pieces[i] is None), None)
