"""Native executors with random weights of real shapes: only sizes and sparsity are real, so only speed is measured.

Weights are written straight into the packed layout, in huge pages; no checkpoint is made. For neuron skipping the
threshold of the activation is set so that the wanted share of gates gives zero.
"""

from __future__ import annotations

from dataclasses import replace

import autoglm_kernels as kernels
import numpy as np

from benchmarks.peers.shapes import Shape
from engine.checkpoints.architecture import Architecture, RopeScaling
from engine.checkpoints.packed import PackedWeights, huge_memory, layout_of
from engine.executors.interface import Span, Wants
from engine.executors.native import KvKind, NativeExecutor, page_bytes
from engine.precision.plan import Plan

TILE = 1 << 24
"""Random bytes that are repeated, from another place in each matrix."""


def architecture(shape: Shape, context: int = 4096, activation_threshold: float = 0.0) -> Architecture:
    """The shape as an Architecture."""
    return Architecture(
        family="glm" if shape.family == "glm" else "qwen2" if shape.family == "qwen2" else "llama",
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        rotary_size=shape.rotary_size,
        rotary_interleaved=shape.family == "glm",
        rope_theta=shape.rope_theta,
        rope_scaling=RopeScaling(),
        rms_norm_eps=shape.rms_norm_eps,
        max_position_embeddings=context,
        activation=shape.activation,
        activation_threshold=activation_threshold,
        qkv_bias=shape.qkv_bias,
        o_bias=False,
        qk_norm=False,
        sandwich_norm=False,
        tie_word_embeddings=shape.tie_word_embeddings,
        end_token_ids=(),
    )


def random_weights(arch: Architecture, plan: Plan, seed: int = 0) -> PackedWeights:
    """Uniform integers with scales that keep the activations near one."""
    entries = layout_of(arch, plan)
    memory = huge_memory(max(entry.end for entry in entries))
    rng = np.random.default_rng(seed)
    tiles = {kind: rng.integers(0, 256, TILE, dtype=np.uint8) for kind in ("int8", "int4", "bf16")}
    # Without the nibble 0 (-8), weights have no mean. With it all gates of a token would rise and fall together.
    tiles["int4"] = (rng.integers(1, 16, TILE) | rng.integers(1, 16, TILE) << 4).astype(np.uint8)
    for entry in entries:
        data = memory[entry.offset : entry.offset + entry.data_bytes]
        if entry.format is None:
            data.view(np.float32)[:] = 0.0 if entry.name.endswith("bias") else 1.0
            continue
        tile = np.roll(tiles[entry.format.kind], int(rng.integers(TILE)))  # no two matrices alike
        for start in range(0, len(data), TILE):
            data[start : start + TILE] = tile[: min(TILE, len(data) - start)]
        if entry.format.kind == "bf16":
            data.view(np.uint16)[:] = _bf16(rng.standard_normal(TILE // 8).astype(np.float32) * 0.02, len(data) // 2)
            continue
        scales = memory[entry.end - (-(-entry.scale_bytes // 64) * 64) :][: entry.scale_bytes].view(np.uint16)
        spread = 74.0 if entry.format.kind == "int8" else 4.6
        scales[:] = _bf16(np.array([1.0 / (spread * entry.columns**0.5)], np.float32), 1)[0]
    return PackedWeights(memory, {entry.name: entry for entry in entries})


def _bf16(
    values: np.ndarray[tuple[int], np.dtype[np.float32]], count: int
) -> np.ndarray[tuple[int], np.dtype[np.uint16]]:
    return np.resize((values.view(np.uint32) >> 16).astype(np.uint16), count)


def executor(
    shape: Shape,
    plan: Plan,
    threads: int,
    *,
    context: int = 4096,
    kv_tokens: int = 40_960,
    max_rows: int = 512,
    kv: KvKind = "bf16",
    inactive: float | None = None,
    pin: bool = False,
) -> NativeExecutor:
    """A ready executor. `inactive` is the share of gates that shall give zero (ReLU shapes only)."""
    arch = architecture(shape, context)
    weights = random_weights(arch, plan)
    device = kernels.Device(threads, pin, "")
    pages = -(-kv_tokens // 16)

    def build(threshold: float, pages: int) -> NativeExecutor:
        return NativeExecutor(replace(arch, activation_threshold=threshold), plan, weights, device, pages, max_rows, kv)

    if inactive is None:
        return build(0.0, pages)
    low, high = 0.0, 8.0
    for _ in range(12):
        middle = (low + high) / 2
        if 1 - active_share(build(middle, 16)) < inactive:
            low = middle
        else:
            high = middle
    return build((low + high) / 2, pages)


def active_share(model: NativeExecutor, tokens: int = 24) -> float:
    """Share of neurons that one token alone computes, over `tokens` steps."""
    for position in range(tokens):
        model.step([Span([(position * 7919) % model.vocab_size], position, [0, 1], Wants.NONE)])
    return model.model.active_neurons / max(1, model.model.all_neurons)


def kv_bytes(shape: Shape, tokens: int, kv: KvKind = "bf16") -> int:
    """Keys and values of so many tokens."""
    return page_bytes(architecture(shape), kv) * -(-tokens // 16)
