"""The block formats of ggml as numpy: bytes to float32, and float32 to the formats the exporter writes.

A tensor's row is a run of blocks. Products are rounded in the order ggml's own reference code has, so that results are
equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]


def dequantise(kind: str, data: U8) -> F32:
    """Float32 values of `data`, whole blocks of a type of `gguf_header.BLOCKS`; may hold NaN or infinity."""
    if kind == "F32":
        return data.view("<f4").astype(np.float32)
    if kind == "F16":
        return data.view("<f2").astype(np.float32)
    if kind == "BF16":
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    width, unpack = _UNPACK[kind]
    with np.errstate(invalid="ignore", over="ignore"):  # the caller looks for NaN
        values: F32 = unpack(data.reshape(-1, width)).reshape(-1)
    return values


def encode(kind: str, values: F32) -> bytes:
    """Rows as F32, F16, BF16 or Q8_0 (then the last axis is a multiple of 32). Raises ValueError when F16 overflows."""
    if kind == "F32":
        return values.astype("<f4").tobytes()
    if kind == "F16":
        with np.errstate(over="ignore"):
            half = values.astype("<f2")
        if not np.isfinite(half).all():
            raise ValueError("a weight is too large for F16; export as BF16 or F32")
        return half.tobytes()
    if kind == "BF16":
        bits = np.ascontiguousarray(values).view(np.uint32)
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16  # to nearest, ties to even
        return rounded.astype("<u2").tobytes()
    if kind != "Q8_0":
        raise ValueError(f"{kind} is not written; F32, F16, BF16 and Q8_0 are")
    blocks = values.reshape(-1, 32)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    with np.errstate(divide="ignore"):
        inverse = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
    scaled = blocks * inverse
    whole = np.trunc(scaled + np.copysign(np.float32(0.5), scaled))  # halves away from zero, as ggml rounds
    with np.errstate(over="ignore"):
        half = scale.astype("<f2")
    if not np.isfinite(half).all():
        raise ValueError("a weight is too large for Q8_0; export as BF16 or F32")
    out = np.empty((len(blocks), 34), dtype=np.uint8)
    out[:, :2] = half.view(np.uint8)
    out[:, 2:] = np.clip(whole, -127, 127).astype(np.int8).view(np.uint8)
    return out.tobytes()


def _half(blocks: U8, at: int) -> F32:
    """The 16-bit float at byte `at` of every block, [blocks, 1]."""
    halves: F32 = np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)
    return halves


def _nibbles(packed: U8) -> U8:
    """Low nibbles of all bytes, then high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _fifth_bits(blocks: U8, at: int) -> U8:
    """32 bits at byte `at`, each as 0 or 16."""
    bits: U8 = np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little") << np.uint8(4)
    return bits


def _q8_0(blocks: U8) -> F32:
    return np.ascontiguousarray(blocks[:, 2:]).view(np.int8).astype(np.float32) * _half(blocks, 0)


def _q4_0(blocks: U8) -> F32:
    return (_nibbles(blocks[:, 2:]).astype(np.float32) - np.float32(8)) * _half(blocks, 0)


def _q4_1(blocks: U8) -> F32:
    return _nibbles(blocks[:, 4:]).astype(np.float32) * _half(blocks, 0) + _half(blocks, 2)


def _q5_0(blocks: U8) -> F32:
    whole = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)
    return (whole.astype(np.float32) - np.float32(16)) * _half(blocks, 0)


def _q5_1(blocks: U8) -> F32:
    whole = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)
    return whole.astype(np.float32) * _half(blocks, 0) + _half(blocks, 2)


def _k_scales(blocks: U8) -> tuple[F32, F32]:
    """Scales and minima of the eight sub-blocks, [blocks, 8, 1]: 6 bits each, packed into bytes 4 to 16."""
    low, middle, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([low & 63, (high & 15) | ((low >> 6) << 4)], axis=1).astype(np.float32)
    minima = np.concatenate([middle & 63, (high >> 4) | ((middle >> 6) << 4)], axis=1).astype(np.float32)
    return (_half(blocks, 0) * scales)[..., None], (_half(blocks, 2) * minima)[..., None]


def _k_nibbles(packed: U8) -> U8:
    """128 bytes as [blocks, 8, 32]: each 32 bytes hold two sub-blocks, low nibbles the first."""
    groups = packed.reshape(-1, 4, 1, 32)
    return np.concatenate([groups & 15, groups >> 4], axis=2).reshape(-1, 8, 32)


def _q4_k(blocks: U8) -> F32:
    scales, minima = _k_scales(blocks)
    return scales * _k_nibbles(blocks[:, 16:]).astype(np.float32) - minima


def _q5_k(blocks: U8) -> F32:
    scales, minima = _k_scales(blocks)
    bits = (blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    whole = _k_nibbles(blocks[:, 48:]) | (bits << 4)
    return scales * whole.astype(np.float32) - minima


def _q6_k(blocks: U8) -> F32:
    # Two halves of 128 values; in each, 64 bytes of low nibbles, 32 bytes of four times two high bits.
    low = blocks[:, :128].reshape(-1, 2, 1, 64)
    low = np.concatenate([low & 15, low >> 4], axis=2).reshape(-1, 2, 4, 32)
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]) & 3
    whole = (low | (high << 4)).astype(np.float32) - np.float32(32)
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32) * _half(blocks, 208)
    return scales[..., None] * whole.reshape(-1, 16, 16)


_UNPACK: Mapping[str, tuple[int, Callable[[U8], Any]]] = {
    "Q8_0": (34, _q8_0), "Q4_0": (18, _q4_0), "Q4_1": (20, _q4_1), "Q5_0": (22, _q5_0), "Q5_1": (24, _q5_1),
    "Q4_K": (144, _q4_k), "Q5_K": (176, _q5_k), "Q6_K": (210, _q6_k),
}  # fmt: skip
