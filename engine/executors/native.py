"""The executor that serves: packed weights and paged keys and values in the kernels' hands, one native call a step.

Its logits are the same bits on every CPU, with any number of threads, in any batch, chunking or page order
(docs/decisions/0006). It differs from the reference executor by quantisation only.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Literal

import autoglm_kernels as kernels
import numpy as np
import numpy.typing as npt

from engine.checkpoints.architecture import Architecture
from engine.checkpoints.packed import PackedWeights, shares_head
from engine.checkpoints.rope import cos_sin_factor, inverse_frequencies
from engine.executors.interface import F32, Span, Wants
from engine.precision.plan import Plan

KvKind = Literal["bf16", "int8"]
PAGE_TOKENS = 16


def page_bytes(arch: Architecture, kv: KvKind) -> int:
    """Keys and values of one page over all layers."""
    elements = 2 * PAGE_TOKENS * arch.head_dim
    head = 2 * elements if kv == "bf16" else elements + 2 * PAGE_TOKENS * 4
    return arch.num_hidden_layers * arch.num_key_value_heads * head


class NativeExecutor:
    """Implements `engine.executors.interface.Executor` for every architecture."""

    def __init__(
        self,
        arch: Architecture,
        plan: Plan,
        weights: PackedWeights,
        device: kernels.Device,
        page_count: int,
        max_rows: int = 512,
        kv: KvKind = "bf16",
    ) -> None:
        self.architecture, self.plan, self.device = arch, plan, device
        self._weights = weights
        self._page_count, self._max_rows = page_count, max_rows
        head = weights.matrix("head")
        tables = {
            "norm": weights.vector("norm"),
            "head": head,
            "embedding": head if shares_head(arch, plan) else weights.matrix("embedding"),
        }
        self.model = kernels.Model(device, _shape(arch, max_rows, kv), tables, _layers(arch, weights))
        self._page_bytes = self.model.page_bytes
        # Untouched pages take no memory, so an idle worker is as small as its load.
        self._memory = mmap.mmap(-1, max(1, page_count * self._page_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._pages = np.frombuffer(self._memory, np.uint8)
        self.model.set_pages(self._pages)
        stride = -(-arch.vocab_size // 16) * 16
        self._rows = mmap.mmap(-1, max_rows * stride * 4, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._logits: F32 = np.frombuffer(self._rows, np.float32).reshape(max_rows, stride)

    @property
    def block_tokens(self) -> int:
        return PAGE_TOKENS

    @property
    def page_bytes(self) -> int:
        return int(self._page_bytes)

    @property
    def page_count(self) -> int:
        return self._page_count

    @property
    def vocab_size(self) -> int:
        return self.architecture.vocab_size

    @property
    def max_rows(self) -> int:
        return self._max_rows

    @property
    def weight_bytes(self) -> int:
        """Packed weights in memory."""
        return self._weights.nbytes

    def step(self, spans: Sequence[Span]) -> list[F32 | None]:
        tokens: list[int] = []
        table: list[int] = []
        wanted: list[int] = []
        shape = np.empty((len(spans), 3), np.int32)
        for number, span in enumerate(spans):
            count = len(span.token_ids)
            needed = -(-(span.start + count) // PAGE_TOKENS)
            shape[number] = (count, span.start, len(table))
            first = len(tokens)
            tokens.extend(span.token_ids)
            table.extend(span.pages[:needed])
            if span.wants is Wants.ALL:
                wanted.extend(range(first, first + count))
            elif span.wants is Wants.LAST:
                wanted.append(first + count - 1)
        self.model.step(_i32(tokens), shape, _i32(table), _i32(wanted), self._logits)
        results: list[F32 | None] = []
        at = 0
        for span in spans:
            rows = {Wants.NONE: 0, Wants.LAST: 1, Wants.ALL: len(span.token_ids)}[span.wants]
            results.append(self._logits[at : at + rows, : self.vocab_size] if rows else None)
            at += rows
        return results

    def read_page(self, page: int) -> bytes:
        return self._pages[page * self._page_bytes : (page + 1) * self._page_bytes].tobytes()

    def write_page(self, page: int, payload: bytes) -> None:
        if len(payload) != self._page_bytes:
            raise ValueError(f"a page has {self._page_bytes} bytes, this one {len(payload)}")
        self._pages[page * self._page_bytes : (page + 1) * self._page_bytes] = np.frombuffer(payload, np.uint8)


def _i32(values: Sequence[int]) -> npt.NDArray[np.int32]:
    return np.array(values, dtype=np.int32)


def _shape(arch: Architecture, max_rows: int, kv: KvKind) -> dict[str, object]:
    return {
        "vocab": arch.vocab_size,
        "hidden": arch.hidden_size,
        "intermediate": arch.intermediate_size,
        "layers": arch.num_hidden_layers,
        "heads": arch.num_attention_heads,
        "kv_heads": arch.num_key_value_heads,
        "head_size": arch.head_dim,
        "rotary": arch.rotary_size,
        "interleaved": arch.rotary_interleaved,
        "kv": kv,
        "eps": arch.rms_norm_eps,
        "activation": arch.activation,
        "threshold": arch.activation_threshold,
        "embedding_scale": arch.embedding_scale,
        "residual_scale": arch.residual_scale,
        "logit_scale": arch.logit_scale,
        "rotary_factor": cos_sin_factor(arch),
        "frequencies": inverse_frequencies(arch).tolist(),
        "max_rows": max_rows,
        "max_context": arch.max_position_embeddings,
    }


def _layers(arch: Architecture, weights: PackedWeights) -> list[dict[str, object]]:
    layers = []
    for number in range(arch.num_hidden_layers):
        layer: dict[str, object] = {name: weights.matrix(f"{number}.{name}") for name in MATRICES}
        for name in VECTORS:
            if (vector := weights.vector(f"{number}.{name}")) is not None:
                layer[name] = vector
        layers.append(layer)
    return layers


MATRICES = ("qkv", "o", "gate", "up", "down")
VECTORS = (
    "input_norm", "post_norm", "post_attention_norm", "post_mlp_norm", "q_norm", "k_norm", "qkv_bias", "o_bias",
)  # fmt: skip
