"""The reference executor: GLM in plain numpy float32. Clear and correct; faster executors are compared with it.

How it keeps the executor contract (bit-identical logits whatever the batch, the chunking or the source of the keys):
BLAS rounds a product differently for different shapes, so **every product has a fixed shape**. Rows of all sequences
are packed into tiles of 16 and each tile is one `[16, in] @ [in, out]`; which row of a tile a token stands in, and what
the other rows hold, does not change its result. Attention runs per aligned block of 16 positions with the queries at
their place in the block and keys up to the block's end, so it too sees one shape per block, be it prefill or decode.

Limits: float32 sums follow the BLAS kernel of this machine's CPU, so two kinds of CPU may differ in the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.checkpoints.glm import F32, GlmConfig, GlmWeights, Layer
from engine.executors.interface import Span

TILE_ROWS = 16
"""Rows per product, and positions per key-value block."""


class ReferenceCache:
    """Keys and values of one sequence: two arrays [layers, kv_heads, capacity, head_dim], zero where unwritten."""

    def __init__(self, config: GlmConfig, capacity_tokens: int) -> None:
        capacity = -(-capacity_tokens // TILE_ROWS) * TILE_ROWS
        shape = (config.num_hidden_layers, config.num_key_value_heads, capacity, config.head_dim)
        self.keys: F32 = np.zeros(shape, dtype=np.float32)
        self.values: F32 = np.zeros(shape, dtype=np.float32)
        self._length = 0

    @property
    def length(self) -> int:
        return self._length

    @property
    def capacity(self) -> int:
        return int(self.keys.shape[2])

    def advance(self, tokens: int) -> None:
        self._length += tokens

    def export_block(self, index: int) -> bytes:
        start, end = index * TILE_ROWS, (index + 1) * TILE_ROWS
        if end > self._length:
            raise ValueError(f"block {index} is not complete: {self._length} tokens are present")
        return self.keys[:, :, start:end].astype("<f4").tobytes() + self.values[:, :, start:end].astype("<f4").tobytes()

    def import_block(self, payload: bytes) -> None:
        layers, heads, _, size = self.keys.shape
        half = layers * heads * TILE_ROWS * size * 4
        if len(payload) != 2 * half:
            raise ValueError(f"a block has {2 * half} bytes, this one {len(payload)}")
        start, end = self._length, self._length + TILE_ROWS
        if start % TILE_ROWS or end > self.capacity:
            raise ValueError(f"a block does not fit at position {start} of {self.capacity}")
        shape = (layers, heads, TILE_ROWS, size)
        self.keys[:, :, start:end] = np.frombuffer(payload, "<f4", count=half // 4).reshape(shape)
        self.values[:, :, start:end] = np.frombuffer(payload, "<f4", offset=half).reshape(shape)
        self._length = end


class ReferenceExecutor:
    """Implements `engine.executors.interface.Executor` for GLM weights."""

    def __init__(self, weights: GlmWeights) -> None:
        self.weights = weights
        self.config = config = weights.config
        pairs = np.arange(0, config.rotary_size, 2, dtype=np.float64)
        inverse = 1.0 / config.rope_theta ** (pairs / max(config.rotary_size, 1))
        angles = np.outer(np.arange(config.max_position_embeddings + TILE_ROWS, dtype=np.float64), inverse)
        self._cos: F32 = np.cos(angles).astype(np.float32)
        self._sin: F32 = np.sin(angles).astype(np.float32)
        # mask[p, k] is added to the score of key k for a query at place p of the last block: 0 or -inf.
        places = np.arange(TILE_ROWS)
        self._mask: F32 = np.where(places[None, :] > places[:, None], -np.inf, 0.0).astype(np.float32)

    @property
    def block_tokens(self) -> int:
        return TILE_ROWS

    @property
    def block_bytes(self) -> int:
        return self.config.kv_bytes_per_token * TILE_ROWS

    def new_cache(self, capacity_tokens: int) -> ReferenceCache:
        return ReferenceCache(self.config, capacity_tokens)

    def step(self, spans: Sequence[Span]) -> list[F32 | None]:
        placed = self._place(spans)
        ids = np.concatenate([np.asarray(span.token_ids, dtype=np.int64) for span in spans])
        positions = np.concatenate([start + np.arange(count) for _, start, count, _ in placed])
        rows = self._pad(self.weights.embedding[ids])
        for number, layer in enumerate(self.weights.layers):
            rows = rows + self._attention(number, layer, rows, placed, positions)
            rows = rows + self._feed_forward(layer, rows)
        for cache, _, count, _ in placed:
            cache.advance(count)
        return self._logits(rows, spans, placed)

    def _place(self, spans: Sequence[Span]) -> list[tuple[ReferenceCache, int, int, int]]:
        """(cache, first position, tokens, first row) of each span."""
        placed: list[tuple[ReferenceCache, int, int, int]] = []
        ends: dict[int, int] = {}
        row = 0
        for span in spans:
            cache, count = span.cache, len(span.token_ids)
            assert isinstance(cache, ReferenceCache)
            start = ends.get(id(cache), cache.length)
            if not 1 <= count <= TILE_ROWS - start % TILE_ROWS:
                raise ValueError(f"{count} tokens at position {start} do not stay inside one block")
            if start + count > cache.capacity:
                raise ValueError(f"the cache holds {cache.capacity} tokens")
            placed.append((cache, start, count, row))
            ends[id(cache)] = start + count
            row += count
        return placed

    @staticmethod
    def _pad(rows: F32) -> F32:
        """[n, hidden] → [tiles, 16, hidden], the missing rows zero."""
        tiles = -(-len(rows) // TILE_ROWS)
        padded = np.zeros((tiles * TILE_ROWS, rows.shape[1]), dtype=np.float32)
        padded[: len(rows)] = rows
        return padded.reshape(tiles, TILE_ROWS, rows.shape[1])

    def _norm(self, rows: F32, weight: F32) -> F32:
        mean = np.mean(rows * rows, axis=-1, keepdims=True)
        scaled: F32 = rows * (1.0 / np.sqrt(mean + np.float32(self.config.rms_norm_eps))) * weight
        return scaled

    def _feed_forward(self, layer: Layer, rows: F32) -> F32:
        both = np.matmul(self._norm(rows, layer.post_norm), layer.gate_up)
        gate, up = both[..., : self.config.intermediate_size], both[..., self.config.intermediate_size :]
        if self.config.hidden_act == "relu":
            active = np.maximum(gate, np.float32(0))
        else:
            with np.errstate(over="ignore"):
                active = gate / (np.float32(1) + np.exp(-gate))
        out: F32 = np.matmul(active * up, layer.down)
        return out

    def _attention(
        self,
        number: int,
        layer: Layer,
        rows: F32,
        placed: list[tuple[ReferenceCache, int, int, int]],
        positions: np.ndarray[tuple[int], np.dtype[np.int64]],
    ) -> F32:
        config = self.config
        heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        projected = np.matmul(self._norm(rows, layer.input_norm), layer.qkv).reshape(-1, layer.qkv.shape[1])
        if layer.qkv_bias is not None:
            projected = projected + layer.qkv_bias
        projected = projected[: len(positions)]
        both = projected[:, : (heads + kv_heads) * size].reshape(len(positions), heads + kv_heads, size)
        both = self._rotate(both, positions)
        values = projected[:, (heads + kv_heads) * size :].reshape(len(positions), kv_heads, size)
        mixed = np.zeros((rows.shape[0] * TILE_ROWS, heads * size), dtype=np.float32)
        for cache, start, count, row in placed:
            stop = row + count
            cache.keys[number, :, start : start + count] = both[row:stop, heads:].transpose(1, 0, 2)
            cache.values[number, :, start : start + count] = values[row:stop].transpose(1, 0, 2)
            mixed[row:stop] = self._attend(number, cache, start, both[row:stop, :heads])
        out: F32 = np.matmul(mixed.reshape(rows.shape[0], TILE_ROWS, heads * size), layer.o)
        return out

    def _attend(self, number: int, cache: ReferenceCache, start: int, queries: F32) -> F32:
        """Grouped-query attention of `queries` [count, heads, size] from position `start`; [count, heads · size]."""
        count, heads, size = queries.shape
        kv_heads = self.config.num_key_value_heads
        place, end = start % TILE_ROWS, (start // TILE_ROWS + 1) * TILE_ROWS
        block = np.zeros((TILE_ROWS, heads, size), dtype=np.float32)
        block[place : place + count] = queries
        # [kv_heads, group · 16, size]: the queries that share a key-value head in one product.
        grouped = block.reshape(TILE_ROWS, kv_heads, heads // kv_heads, size).transpose(1, 2, 0, 3)
        stacked = np.ascontiguousarray(grouped).reshape(kv_heads, -1, size)
        scores: F32 = np.matmul(stacked, cache.keys[number, :, :end].transpose(0, 2, 1)) * np.float32(size**-0.5)
        scores.reshape(kv_heads, -1, TILE_ROWS, end)[..., end - TILE_ROWS :] += self._mask
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        out: F32 = np.matmul(scores, cache.values[number, :, :end])
        by_row = out.reshape(kv_heads, heads // kv_heads, TILE_ROWS, size).transpose(2, 0, 1, 3)
        merged: F32 = by_row.reshape(TILE_ROWS, heads * size)[place : place + count]
        return merged

    def _rotate(self, x: F32, positions: np.ndarray[tuple[int], np.dtype[np.int64]]) -> F32:
        """Rotary embedding on interleaved pairs of the first `rotary_size` dimensions (arXiv 2104.09864, eq. 34)."""
        size = self.config.rotary_size
        if size == 0:
            return x
        cos, sin = self._cos[positions][:, None], self._sin[positions][:, None]
        even, odd = x[..., 0:size:2], x[..., 1:size:2]
        out = x.copy()
        out[..., 0:size:2] = even * cos - odd * sin
        out[..., 1:size:2] = odd * cos + even * sin
        return out

    def _logits(
        self, rows: F32, spans: Sequence[Span], placed: list[tuple[ReferenceCache, int, int, int]]
    ) -> list[F32 | None]:
        flat = rows.reshape(-1, rows.shape[-1])
        wanted = [(row, count) for span, (_, _, count, row) in zip(spans, placed, strict=True) if span.wants_logits]
        if not wanted:
            return [None] * len(spans)
        gathered = self._pad(np.concatenate([flat[row : row + count] for row, count in wanted]))
        logits = np.matmul(self._norm(gathered, self.weights.norm), self.weights.head)
        logits = logits.reshape(-1, self.config.vocab_size)
        results: list[F32 | None] = []
        offset = 0
        for span in spans:
            count = len(span.token_ids) if span.wants_logits else 0
            results.append(logits[offset : offset + count] if count else None)
            offset += count
        return results
