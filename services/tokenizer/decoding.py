"""Ids to text, all at once or as they come. Both ways share one path, so a stream's parts always join to the whole.

Bytes that form no character become U+FFFD as soon as that is certain; an unfinished character is held back. The price
per token is constant: nothing is decoded twice.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence

from services.tokenizer.vocabulary import Vocabulary


class TextDecoder:
    """Decodes one stream. `push` and then, once, `finish`; ids must be in the vocabulary."""

    def __init__(self, vocabulary: Vocabulary, keep_special: bool) -> None:
        self._pieces = vocabulary.pieces
        self._skipped = frozenset[int]() if keep_special else vocabulary.special_ids
        self._drops_space = vocabulary.drops_leading_space
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


def decode(vocabulary: Vocabulary, ids: Sequence[int], keep_special: bool) -> str:
    """The whole text of `ids`."""
    decoder = TextDecoder(vocabulary, keep_special)
    return decoder.push(ids) + decoder.finish()


def bytes_of(vocabulary: Vocabulary, ids: Sequence[int]) -> list[bytes]:
    """Each token's own bytes, special tokens included."""
    return [piece for number in ids if (piece := vocabulary.pieces[number]) is not None]
