"""The reference executor: every architecture in plain numpy float32. Clear and correct; faster executors are compared
with it.

How it keeps the executor contract (bit-identical logits whatever the batch, the chunking or the pages):
BLAS rounds a product differently for different shapes, and on some CPUs (its AVX2 kernels) a row differently from place
to place. So **every product has a fixed shape, and every token a fixed place**: rows of all sequences are packed into
tiles of 16, each tile is one `[16, in] @ [in, out]`, and a token stands at its position modulo 16. What the other rows
hold does not change its result. Attention runs per aligned block of 16 positions with the queries at their place in the
block and keys up to the block's end, so it too sees one shape per block, be it prefill or decode.

Limits: float32 sums follow the BLAS kernel of this machine's CPU, so two kinds of CPU may differ in the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.checkpoints.architecture import Architecture, Checkpoint, CheckpointError, present_tensors
from engine.checkpoints.rope import cos_sin_factor, inverse_frequencies
from engine.executors.interface import F32, Span, Wants

I64 = npt.NDArray[np.int64]

TILE_ROWS = 16
"""Rows per product, and positions per page."""


def page_bytes(arch: Architecture) -> int:
    """float32 keys and values of one page over all layers: what `ReferenceExecutor.page_bytes` will be."""
    return arch.num_hidden_layers * 2 * arch.num_key_value_heads * TILE_ROWS * arch.head_dim * 4


@dataclass(frozen=True, slots=True)
class _Placed:
    """A span in a step: its tokens are tokens `first` … of the step and positions `start` … of its sequence."""

    pages: I64
    start: int
    count: int
    first: int

    @property
    def mine(self) -> slice:
        return slice(self.first, self.first + self.count)


class ReferenceExecutor:
    """Implements `engine.executors.interface.Executor` for every architecture."""

    def __init__(self, checkpoint: Checkpoint, page_count: int, max_rows: int = 512, max_bytes: int = 64 << 30) -> None:
        """Reads all weights. Raises CheckpointError, also when they would take more than `max_bytes` as float32."""
        self.architecture = arch = checkpoint.architecture
        self.weight_bytes = 4 * arch.parameters
        if self.weight_bytes > max_bytes:
            raise CheckpointError(f"float32 weights would take {self.weight_bytes} bytes, at most {max_bytes} may")
        self._page_count, self._max_rows = page_count, max_rows
        self._embedding = checkpoint.tensor("embedding")
        self._head = self._embedding if arch.tie_word_embeddings else checkpoint.tensor("head")
        self._norm_weight = checkpoint.tensor("norm")
        names = present_tensors(arch)
        self._layers = [
            {name: checkpoint.tensor(name, layer) for name in names} for layer in range(arch.num_hidden_layers)
        ]
        # [page, keys or values, layer, head, position in page, dimension]: a page is one piece of memory.
        shape = (2, arch.num_hidden_layers, arch.num_key_value_heads, TILE_ROWS, arch.head_dim)
        self._pool: F32 = np.zeros((page_count, *shape), dtype=np.float32)
        # Positions beyond what the pages can hold do not occur. Angles are float32, as in transformers.
        positions = np.arange(min(page_count * TILE_ROWS, arch.max_position_embeddings + TILE_ROWS), dtype=np.float32)
        angles = np.outer(positions, inverse_frequencies(arch).astype(np.float32)).astype(np.float64)
        self._cos: F32 = (np.cos(angles) * cos_sin_factor(arch)).astype(np.float32)
        self._sin: F32 = (np.sin(angles) * cos_sin_factor(arch)).astype(np.float32)
        # mask[p, k] is added to the score of key k for a query at place p of the last block: 0 or -inf.
        places = np.arange(TILE_ROWS)
        self._mask: F32 = np.where(places[None, :] > places[:, None], -np.inf, 0.0).astype(np.float32)

    @property
    def block_tokens(self) -> int:
        return TILE_ROWS

    @property
    def page_bytes(self) -> int:
        return page_bytes(self.architecture)

    @property
    def page_count(self) -> int:
        return self._page_count

    @property
    def vocab_size(self) -> int:
        return self.architecture.vocab_size

    @property
    def max_rows(self) -> int:
        return self._max_rows

    def read_page(self, page: int) -> bytes:
        payload: bytes = self._pool[self._known(page)].astype("<f4", copy=False).tobytes()
        return payload

    def write_page(self, page: int, payload: bytes) -> None:
        if len(payload) != self.page_bytes:
            raise ValueError(f"a page has {self.page_bytes} bytes, this one {len(payload)}")
        self._pool[self._known(page)] = np.frombuffer(payload, "<f4").reshape(self._pool.shape[1:])

    def step(self, spans: Sequence[Span]) -> list[F32 | None]:
        if not spans:
            return []
        placed = self._place(spans)
        ids = np.concatenate([np.asarray(span.token_ids, dtype=np.int64) for span in spans])
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            raise ValueError(f"token ids are 0 to {self.vocab_size - 1}, seen were {ids.min()} to {ids.max()}")
        positions = np.concatenate([each.start + np.arange(each.count) for each in placed])
        rows, slots = _tiled(_scaled(self._embedding[ids], self.architecture.embedding_scale), positions)
        scale = self.architecture.residual_scale
        for number in range(len(self._layers)):
            rows = rows + _scaled(self._attention(number, rows, slots, placed, positions), scale)
            rows = rows + _scaled(self._feed_forward(number, rows), scale)
        return self._logits(_flat(rows)[slots], positions, spans, placed)

    def _known(self, page: int) -> int:
        if not 0 <= page < self._page_count:
            raise ValueError(f"pages are 0 to {self._page_count - 1}, not {page}")
        return page

    def _place(self, spans: Sequence[Span]) -> list[_Placed]:
        """Checks the spans and numbers their tokens. Raises ValueError."""
        placed: list[_Placed] = []
        total = 0
        for span in spans:
            count = len(span.token_ids)
            blocks = -(-(span.start + count) // TILE_ROWS)
            if count < 1 or span.start < 0 or len(span.pages) < blocks:
                raise ValueError(f"{count} tokens at position {span.start} with {len(span.pages)} pages")
            if span.start + count > len(self._cos):
                raise ValueError(f"position {span.start + count - 1} is beyond the context or the pages there are")
            pages = np.asarray([self._known(page) for page in span.pages[:blocks]], dtype=np.int64)
            placed.append(_Placed(pages, span.start, count, total))
            total += count
        if total > self._max_rows:
            raise ValueError(f"{total} tokens in one step, at most {self._max_rows} may be")
        return placed

    def _norm(self, rows: F32, weight: F32) -> F32:
        mean = np.mean(rows * rows, axis=-1, keepdims=True)
        scaled: F32 = rows * (1.0 / np.sqrt(mean + np.float32(self.architecture.rms_norm_eps))) * weight
        return scaled

    def _feed_forward(self, number: int, rows: F32) -> F32:
        weights = self._layers[number]
        normed = self._norm(rows, weights["post_norm"])
        active = self._activated(np.matmul(normed, weights["gate"].T))
        out: F32 = np.matmul(active * np.matmul(normed, weights["up"].T), weights["down"].T)
        return self._norm(out, weights["post_mlp_norm"]) if self.architecture.sandwich_norm else out

    def _activated(self, gate: F32) -> F32:
        kind = self.architecture.activation
        active: F32
        if kind == "relu":
            active = np.where(gate > np.float32(self.architecture.activation_threshold), gate, np.float32(0))
        elif kind == "relu2":
            active = np.square(np.maximum(gate, np.float32(0)))
        elif kind == "gelu_tanh":
            inner = (gate + gate * gate * gate * np.float32(0.044715)) * np.float32(math.sqrt(2 / math.pi))
            bent: F32 = np.tanh(inner)
            active = gate * (bent + np.float32(1)) * np.float32(0.5)
        else:
            with np.errstate(over="ignore"):
                decay: F32 = np.exp(-gate)
                active = gate / (np.float32(1) + decay)
        return active

    def _attention(self, number: int, rows: F32, slots: I64, placed: list[_Placed], positions: I64) -> F32:
        arch, weights = self.architecture, self._layers[number]
        normed = self._norm(rows, weights["input_norm"])
        queries, keys, values = (self._projected(normed, weights, name)[slots] for name in ("q", "k", "v"))
        if arch.qk_norm:
            queries, keys = self._norm(queries, weights["q_norm"]), self._norm(keys, weights["k_norm"])
        queries, keys = self._rotated(queries, positions), self._rotated(keys, positions)
        mixed = np.zeros((rows.shape[0] * TILE_ROWS, arch.num_attention_heads * arch.head_dim), dtype=np.float32)
        for each in placed:
            where = np.arange(each.start, each.start + each.count)
            pages, places = each.pages[where // TILE_ROWS], where % TILE_ROWS
            self._pool[pages, 0, number, :, places] = keys[each.mine]
            self._pool[pages, 1, number, :, places] = values[each.mine]
            mixed[slots[each.mine]] = self._attend_all(number, each, queries[each.mine])
        out: F32 = np.matmul(mixed.reshape(rows.shape[0], TILE_ROWS, -1), weights["o"].T)
        if arch.o_bias:
            out = out + weights["o_bias"]
        return self._norm(out, weights["post_attention_norm"]) if arch.sandwich_norm else out

    def _projected(self, normed: F32, weights: dict[str, F32], name: str) -> F32:
        """[slots, heads, head_dim]"""
        out: F32 = np.matmul(normed, weights[name].T)
        if self.architecture.qkv_bias:
            out = out + weights[f"{name}_bias"]
        return _flat(out).reshape(-1, out.shape[-1] // self.architecture.head_dim, self.architecture.head_dim)

    def _attend_all(self, number: int, placed: _Placed, queries: F32) -> F32:
        """Attention of a span, block by block; [count, heads · head_dim]."""
        stop = placed.start + placed.count
        # [heads, positions, head_dim]. What no token has written yet may hold anything: nobody may see it.
        keys, values = (
            np.ascontiguousarray(self._pool[placed.pages, which, number].transpose(1, 0, 2, 3)).reshape(
                queries.shape[1] // self._group, -1, queries.shape[2]
            )
            for which in (0, 1)
        )
        keys[:, stop:] = 0
        values[:, stop:] = 0
        parts = []
        start = placed.start
        while start < stop:
            end = (start // TILE_ROWS + 1) * TILE_ROWS
            count = min(end, stop) - start
            offset = start - placed.start
            parts.append(
                self._attend(start % TILE_ROWS, queries[offset : offset + count], keys[:, :end], values[:, :end])
            )
            start += count
        return np.concatenate(parts)

    @property
    def _group(self) -> int:
        """Query heads per key-value head."""
        return self.architecture.num_attention_heads // self.architecture.num_key_value_heads

    def _attend(self, place: int, queries: F32, keys: F32, values: F32) -> F32:
        """Queries [count, heads, size] from `place` of the last block of keys [kv_heads, positions, size]."""
        count, heads, size = queries.shape
        kv_heads, end, _ = keys.shape
        block = np.zeros((TILE_ROWS, heads, size), dtype=np.float32)
        block[place : place + count] = queries
        # [kv_heads, group · 16, size]: the queries that share a key-value head in one product.
        grouped = block.reshape(TILE_ROWS, kv_heads, self._group, size).transpose(1, 2, 0, 3)
        stacked = np.ascontiguousarray(grouped).reshape(kv_heads, -1, size)
        scores: F32 = np.matmul(stacked, np.ascontiguousarray(keys).transpose(0, 2, 1)) * np.float32(size**-0.5)
        scores.reshape(kv_heads, -1, TILE_ROWS, end)[..., end - TILE_ROWS :] += self._mask
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        out: F32 = np.matmul(scores, np.ascontiguousarray(values))
        by_row = out.reshape(kv_heads, self._group, TILE_ROWS, size).transpose(2, 0, 1, 3)
        merged: F32 = by_row.reshape(TILE_ROWS, heads * size)[place : place + count]
        return merged

    def _rotated(self, x: F32, positions: I64) -> F32:
        """Rotary embedding of the first `rotary_size` dimensions (arXiv 2104.09864, eq. 34)."""
        size = self.architecture.rotary_size
        if size == 0:
            return x
        if self.architecture.rotary_interleaved:
            first, second = slice(0, size, 2), slice(1, size, 2)
        else:
            first, second = slice(0, size // 2), slice(size // 2, size)
        cos, sin = self._cos[positions][:, None], self._sin[positions][:, None]
        out = x.copy()
        out[..., first] = x[..., first] * cos - x[..., second] * sin
        out[..., second] = x[..., second] * cos + x[..., first] * sin
        return out

    def _logits(self, rows: F32, positions: I64, spans: Sequence[Span], placed: list[_Placed]) -> list[F32 | None]:
        """`rows` has one per token; those that nobody wants are not computed."""
        counts = [{Wants.NONE: 0, Wants.LAST: 1, Wants.ALL: len(span.token_ids)}[span.wants] for span in spans]
        if not any(counts):
            return [None] * len(spans)
        ends = [each.first + each.count for each in placed]
        wanted = np.concatenate([np.arange(end - count, end) for end, count in zip(ends, counts, strict=True)])
        tiles, slots = _tiled(rows[wanted], positions[wanted])
        logits = _flat(np.matmul(self._norm(tiles, self._norm_weight), self._head.T))[slots]
        logits = _scaled(logits, self.architecture.logit_scale)
        results: list[F32 | None] = []
        offset = 0
        for count in counts:
            results.append(logits[offset : offset + count] if count else None)
            offset += count
        return results


def _tiled(rows: F32, positions: I64) -> tuple[F32, I64]:
    """[n, hidden] → [tiles, 16, hidden], each row at its position modulo 16, others zero; and the slot of each row."""
    used = [0] * TILE_ROWS
    slots = np.empty(len(rows), dtype=np.int64)
    for index, place in enumerate((positions % TILE_ROWS).tolist()):
        slots[index] = used[place] * TILE_ROWS + place
        used[place] += 1
    tiles = np.zeros((max(used), TILE_ROWS, rows.shape[1]), dtype=np.float32)
    _flat(tiles)[slots] = rows
    return tiles, slots


def _flat(tiles: F32) -> F32:
    """[tiles, 16, n] → [slots, n]"""
    return tiles.reshape(-1, tiles.shape[-1])


def _scaled(rows: F32, scale: float) -> F32:
    return rows if scale == 1.0 else rows * np.float32(scale)
