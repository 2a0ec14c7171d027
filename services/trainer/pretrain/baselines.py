"""What the held-out figure is compared with: general compressors and count-based models of the same text.

Every figure is bits per UTF-8 byte of the same held-out documents. Compressors get them as one stream, in path order,
which favours them a little; the xz-with-prior figure shows how much of the held-out text is repetition of the training
text. The n-gram models are interpolated Witten–Bell (Witten & Bell, "The zero-frequency problem", IEEE Trans. Inform.
Theory 37(4), 1991, method C). They see the text document by document, like the neural model.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from services.trainer.pretrain.bpe import PREFIX, encode_documents
from services.trainer.pretrain.corpus import Document

BYTE_ORDER = 8
"""Longest byte n-gram: eight bytes fill one 64-bit key."""

TOKEN_ORDER = 3

NOTES = {
    "gzip -9": "sees none",
    "xz -9e": "sees none",
    "xz -9e after the training text": "size of training and held-out text together, less that of the training text",
    "byte n-gram, Witten–Bell": f"sees all; the best n up to {BYTE_ORDER}, chosen on the held-out text in its favour",
    "token n-gram, Witten–Bell": f"glm-tiny's own training ids; the best n up to {TOKEN_ORDER}, chosen likewise",
}
COUNT = len(NOTES)

Symbols = npt.NDArray[np.uint16]
Keys = npt.NDArray[np.uint64]


def measure(
    train: Sequence[Document],
    held_out: Sequence[Document],
    tokenizer: Tokenizer,
    train_ids: Symbols,
    on_stage: Callable[[int, str], None],
) -> dict[str, Any]:
    """All baselines, a minute or two in sum; `on_stage` is told the number done and the name of the next."""
    held_bytes = "".join(d.text for d in held_out).encode()

    def size(compressed: int) -> dict[str, Any]:
        return {"bits_per_byte": 8 * compressed / len(held_bytes)}

    runs: dict[str, Callable[[], dict[str, Any]]] = {
        "gzip -9": lambda: size(len(gzip.compress(held_bytes, 9, mtime=0))),
        "xz -9e": lambda: size(_xz_size(held_bytes)),
        "xz -9e after the training text": lambda: size(_xz_prior("".join(d.text for d in train).encode(), held_bytes)),
        "byte n-gram, Witten–Bell": lambda: _byte_ngram(train, held_out),
        "token n-gram, Witten–Bell": lambda: _token_ngram(train_ids, held_out, tokenizer),
    }
    results: dict[str, dict[str, Any]] = {}
    for number, (name, run) in enumerate(runs.items()):
        on_stage(number, name)
        started = time.monotonic()
        results[name] = {**run(), "note": NOTES[name], "took_s": round(time.monotonic() - started, 1)}
    on_stage(len(runs), "done")
    return {"held_out_digest": digest(held_out), "held_out_bytes": len(held_bytes), "results": results}


def digest(documents: Sequence[Document]) -> str:
    """Names a set of documents, so a stored measurement of other text is noticed."""
    joined = "".join(f"{d.path}\0{d.sha256}\n" for d in documents)
    return "sha256:" + hashlib.sha256(joined.encode()).hexdigest()


def witten_bell(
    train: Symbols, held_out: Symbols, is_scored: npt.NDArray[np.bool_], order: int, symbol_bits: int
) -> list[float]:
    """Total bits of the scored held-out symbols for n = 1 … order, each interpolated down to the uniform distribution.

    `order * symbol_bits` is at most 64: an n-gram is one packed key, counted by sorting. Positions with fewer than
    order − 1 symbols before them see symbol 0 there.
    """
    if order * symbol_bits > 64:
        raise ValueError(f"{order} symbols of {symbol_bits} bits do not fit a 64-bit key")
    shift = np.uint64(symbol_bits)
    probability = np.full(int(is_scored.sum()), 2.0**-symbol_bits)
    bits: list[float] = []
    for length in range(1, order + 1):
        grams, counts = _count(_packed(train, length, symbol_bits))
        contexts, first = np.unique(grams >> shift, return_index=True)
        kinds = np.diff(np.append(first, len(grams)))
        totals = np.add.reduceat(counts, first)
        wanted = _packed(held_out, length, symbol_bits)[is_scored]
        count = _look_up(grams, counts, wanted)
        total = _look_up(contexts, totals, wanted >> shift)
        kind = _look_up(contexts, kinds, wanted >> shift)
        seen = total > 0
        probability[seen] = (count[seen] + kind[seen] * probability[seen]) / (total[seen] + kind[seen])
        bits.append(float(-np.log2(probability).sum()))
    return bits


def _packed(symbols: Symbols, length: int, symbol_bits: int) -> Keys:
    """Key i holds symbols i − length + 1 … i, the last one in the low bits."""
    keys = np.zeros(len(symbols), dtype=np.uint64)
    for back in range(length):
        keys[back:] |= symbols[: len(symbols) - back].astype(np.uint64) << np.uint64(back * symbol_bits)
    return keys


def _count(keys: Keys) -> tuple[Keys, npt.NDArray[np.int64]]:
    keys.sort()
    starts = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
    return keys[starts], np.diff(np.append(starts, len(keys)))


def _look_up(keys: Keys, values: npt.NDArray[np.int64], wanted: Keys) -> npt.NDArray[np.int64]:
    """values[keys == wanted], 0 where absent; `keys` is sorted."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)


def _byte_ngram(train: Sequence[Document], held_out: Sequence[Document]) -> dict[str, Any]:
    # Zero bytes before each document stand for "the text begins": no n-gram reaches into the document before.
    pad = bytes(BYTE_ORDER - 1)
    known = np.frombuffer(b"".join(pad + d.text.encode() for d in train), dtype=np.uint8).astype(np.uint16)
    asked = np.frombuffer(b"".join(pad + d.text.encode() for d in held_out), dtype=np.uint8).astype(np.uint16)
    is_scored = np.concatenate([np.arange(len(pad) + len(d.text.encode())) >= len(pad) for d in held_out])
    return _by_order(witten_bell(known, asked, is_scored, BYTE_ORDER, 8), int(is_scored.sum()))


def _token_ngram(train_ids: Symbols, held_out: Sequence[Document], tokenizer: Tokenizer) -> dict[str, Any]:
    documents = encode_documents(tokenizer, [d.text for d in held_out])
    asked = np.concatenate([np.asarray(ids, dtype=np.uint16) for ids in documents])
    # The prefix and the end mark are not text: they are context, never scored.
    is_scored = np.concatenate(
        [(np.arange(len(ids)) >= len(PREFIX)) & (np.arange(len(ids)) < len(ids) - 1) for ids in documents]
    )
    symbol_bits = (tokenizer.get_vocab_size() - 1).bit_length()
    held_bytes = sum(len(d.text.encode()) for d in held_out)
    return _by_order(witten_bell(train_ids, asked, is_scored, TOKEN_ORDER, symbol_bits), held_bytes)


def _by_order(bits: list[float], byte_count: int) -> dict[str, Any]:
    by_order = [value / byte_count for value in bits]
    best = min(by_order)
    return {"bits_per_byte": best, "order": by_order.index(best) + 1, "bits_per_byte_by_order": by_order}


def _xz_size(data: bytes) -> int:
    # The dictionary spans everything, so all of the prior stays reachable.
    dictionary = max(1 << 26, 1 << (len(data) - 1).bit_length())
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": dictionary}]
    return len(lzma.compress(data, format=lzma.FORMAT_XZ, filters=filters))


def _xz_prior(prior: bytes, data: bytes) -> int:
    return _xz_size(prior + data) - _xz_size(prior)
