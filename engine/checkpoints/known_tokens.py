"""Which of a model's ids its tokenizer knows.

Vocabularies are padded to round sizes: Qwen's heads have 151,936 rows for 151,665 tokens. An id without a token has no
text, so it must never be drawn, and no prompt can hold it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.checkpoints.digests import MAX_TEXT_FILE_BYTES, TEXT_FILES
from engine.checkpoints.files import read_bounded
from engine.checkpoints.gguf_tokenizer import read_text_files

log = logging.getLogger("autoglm.engine")


@dataclass(frozen=True, slots=True)
class KnownTokens:
    """Ids below `size` but for `holes`."""

    size: int
    holes: frozenset[int] = frozenset()

    def first_unknown(self, ids: Iterable[int]) -> int | None:
        """The first of `ids` that is no token."""
        return next((token for token in ids if token >= self.size or token in self.holes), None)


def known_tokens(path: Path, vocab_size: int, end_token_ids: Iterable[int]) -> KnownTokens:
    """Of a model directory or a .gguf file. A model's own ends are known: they end an answer and need no text.

    A tokenizer that says nothing about its ids leaves all of them known, with a word in the log.
    """
    try:
        if path.suffix == ".gguf":
            source: Any = read_text_files(path).tokenizer
        else:
            source = json.loads(read_bounded(path / TEXT_FILES[0], MAX_TEXT_FILE_BYTES))
        ids = _ids(source)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        log.warning("the tokenizer does not tell its ids; every row of the head may be drawn: %s", str(error)[:200])
        return KnownTokens(vocab_size)
    known = {token for token in ids | set(end_token_ids) if 0 <= token < vocab_size}
    if not known:
        return KnownTokens(vocab_size)
    size = max(known) + 1
    return KnownTokens(size, frozenset(range(size)) - known)


def _ids(source: Mapping[str, Any]) -> set[int]:
    """A vocabulary is an object of texts and ids, or (Unigram) a list whose places are the ids."""
    vocabulary = source["model"]["vocab"]
    ids = set(map(int, vocabulary.values())) if isinstance(vocabulary, dict) else set(range(len(vocabulary)))
    return ids | {int(token["id"]) for token in source.get("added_tokens") or ()}
