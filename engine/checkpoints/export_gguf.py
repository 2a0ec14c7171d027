"""Writes any opened model as a GGUF file (version 3), in the layout llama.cpp's converters give.

Weights are written row by row, so memory stays small. Vectors stay F32. Query and key rows of Llama and MiniCPM are
put into the order of interleaved rotary pairs. GGUF has no word for an activation: `autoglm.activation` says it, which
other programs do not read, and `Exported.notes` says so. A file appears under its name only when it is whole.
"""

from __future__ import annotations

import math
import os
import struct
import tempfile
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.checkpoints.architecture import (
    F32,
    Architecture,
    Checkpoint,
    CheckpointError,
    present_tensors,
    tensor_shape,
)
from engine.checkpoints.gguf_blocks import encode
from engine.checkpoints.gguf_header import BLOCKS, Value
from engine.checkpoints.gguf_reader import (
    FAMILIES,
    FUSED,
    GLOBAL_NAMES,
    LAYER_NAMES,
    ROPE_FACTORS,
    GgufCheckpoint,
)
from engine.checkpoints.gguf_text import Text, text_metadata
from engine.checkpoints.rope import inverse_frequencies, yarn_attention_factor

FILE_TYPES: Mapping[str, int] = {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7}
"""Types that can be written → general.file_type."""
ALIGNMENT = 32
PIECE_ELEMENTS = 1 << 20

Progress = Callable[[int, int], None]
"""Called with bytes written and bytes in all."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written, and in words what other programs will do differently."""

    bytes_written: int
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Part:
    """A canonical tensor that goes into a stored one."""

    name: str
    layer: int | None


@dataclass(frozen=True, slots=True)
class _Planned:
    name: str
    kind: str
    shape: tuple[int, ...]
    parts: tuple[_Part, ...]
    values: F32 | None = None

    @property
    def size(self) -> int:
        _, elements, size = next(each for each in BLOCKS.values() if each[0] == self.kind)
        return math.prod(self.shape) // elements * size


def export_gguf(
    checkpoint: Checkpoint, source: Path, target: Path, kind: str = "Q8_0", progress: Progress | None = None
) -> Exported:
    """Writes `target`. `source` is where the model was opened: its tokenizer goes along. Raises CheckpointError."""
    if kind not in FILE_TYPES:
        raise CheckpointError(f"weights are written as {', '.join(FILE_TYPES)}, not as {kind}")
    arch = checkpoint.architecture
    name, notes = _architecture_name(arch)
    if isinstance(checkpoint, GgufCheckpoint):
        kept = {key: value for key, value in checkpoint.header.metadata.items() if key.startswith("tokenizer.")}
        text = Text(kept, ())
    else:
        text = text_metadata(source, arch.family, arch.vocab_size, arch.end_token_ids)
    metadata = _metadata(arch, name, kind, source.stem) | text.metadata
    planned = list(_plan(arch, kind))
    header = _header(metadata, planned)
    total = len(header) + sum(-(-each.size // ALIGNMENT) * ALIGNMENT for each in planned)
    try:
        descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-")
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written ({error.strerror})") from None
    try:
        with open(descriptor, "wb") as file:
            file.write(header)
            for each in planned:
                for piece in _bytes(checkpoint, each):
                    file.write(piece)
                    if progress is not None:
                        progress(file.tell(), total)
                file.write(bytes(-each.size % ALIGNMENT))
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written ({error.strerror or error})") from None
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
    return Exported(total, (*notes, *text.notes))


def _architecture_name(arch: Architecture) -> tuple[str, list[str]]:
    notes = []
    name = next(name for name, (family, _) in FAMILIES.items() if family == arch.family)
    if arch.activation != "silu":
        notes.append(
            f"GGUF has no word for the activation {arch.activation!r}: this project reads it from autoglm.activation, "
            "other programs will compute SiLU instead"
        )
    if arch.family in ("glm", "glm4", "minicpm") and arch.rope_scaling.kind in ("llama3", "factors"):
        notes.append(f"other programs ignore rotary factors in {name!r} files")
    if arch.family == "qwen3" and arch.qkv_bias:
        notes.append("other programs do not expect attention biases in 'qwen3' files")
    return name, notes


def _metadata(arch: Architecture, name: str, kind: str, title: str) -> dict[str, Value]:
    entries: dict[str, Value] = {
        "general.architecture": name.encode(),
        "general.name": title.encode(errors="replace"),
        "general.file_type": FILE_TYPES[kind],
        "general.quantization_version": 2,
        "general.alignment": ALIGNMENT,
        f"{name}.vocab_size": arch.vocab_size,
        f"{name}.context_length": arch.max_position_embeddings,
        f"{name}.embedding_length": arch.hidden_size,
        f"{name}.block_count": arch.num_hidden_layers,
        f"{name}.feed_forward_length": arch.intermediate_size,
        f"{name}.attention.head_count": arch.num_attention_heads,
        f"{name}.attention.head_count_kv": arch.num_key_value_heads,
        f"{name}.attention.key_length": arch.head_dim,
        f"{name}.attention.value_length": arch.head_dim,
        f"{name}.attention.layer_norm_rms_epsilon": arch.rms_norm_eps,
        f"{name}.rope.dimension_count": arch.rotary_size,
        f"{name}.rope.freq_base": arch.rope_theta,
        "autoglm.end_token_ids": array("q", arch.end_token_ids),
    }
    if arch.activation != "silu":
        entries["autoglm.activation"] = arch.activation.encode()
        entries["autoglm.activation_threshold"] = arch.activation_threshold
    if arch.family == "minicpm":
        entries[f"{name}.embedding_scale"] = arch.embedding_scale
        entries[f"{name}.residual_scale"] = arch.residual_scale
        entries[f"{name}.logit_scale"] = 1.0 / arch.logit_scale
    scaling, stem = arch.rope_scaling, f"{name}.rope.scaling."
    if scaling.kind in ("linear", "yarn"):
        entries[f"{stem}type"] = scaling.kind.encode()
        entries[f"{stem}factor"] = scaling.factor
    if scaling.kind == "yarn":
        entries[f"{stem}original_context_length"] = scaling.original_context
        entries[f"{stem}yarn_beta_fast"] = scaling.beta_fast
        entries[f"{stem}yarn_beta_slow"] = scaling.beta_slow
        entries[f"{stem}attn_factor"] = scaling.attention_factor / yarn_attention_factor(scaling.factor)
    return entries


def _plan(arch: Architecture, kind: str) -> Iterator[_Planned]:
    def whole(stored: str, *parts: _Part) -> _Planned:
        shapes = [tensor_shape(arch, part.name) for part in parts]
        shape = (sum(each[0] for each in shapes), *shapes[0][1:])
        own = "F32" if len(shape) == 1 else "F16" if kind == "Q8_0" and shape[-1] % 32 else kind
        return _Planned(stored, own, shape, parts)

    for name, stored in GLOBAL_NAMES.items():
        if name != "head" or not arch.tie_word_embeddings:
            yield whole(stored, _Part(name, None))
    if arch.rope_scaling.kind in ("llama3", "factors"):
        factors = _rope_factors(arch)
        yield _Planned(ROPE_FACTORS, "F32", factors.shape, (), factors)
    for layer in range(arch.num_hidden_layers):
        for name in present_tensors(arch):
            stored = f"blk.{layer}.{LAYER_NAMES[name]}"
            if arch.family not in FUSED or name not in ("gate", "up"):
                yield whole(stored, _Part(name, layer))
            elif name == "up":
                yield whole(stored, _Part("gate", layer), _Part("up", layer))


def _rope_factors(arch: Architecture) -> F32:
    """What each pair's plain frequency is divided by."""
    if arch.rope_scaling.kind == "factors":
        return np.array(arch.rope_scaling.factors, dtype=np.float32)
    plain = arch.rope_theta ** -(np.arange(0, arch.rotary_size, 2, dtype=np.float64) / arch.rotary_size)
    factors: F32 = (plain / inverse_frequencies(arch)).astype(np.float32)
    return factors


def _bytes(checkpoint: Checkpoint, planned: _Planned) -> Iterator[bytes]:
    arch = checkpoint.architecture
    if planned.values is not None:
        yield encode(planned.kind, planned.values)
    for part in planned.parts:
        shape = tensor_shape(arch, part.name)
        needs_order = FAMILIES[_architecture_name(arch)[0]][1] and not arch.rotary_interleaved
        is_rotated = needs_order and part.name in ("q", "k", "q_bias", "k_bias")
        heads = arch.head_dim if is_rotated else 1  # rows that stay together
        step = max(heads, PIECE_ELEMENTS // math.prod(shape[1:]) // heads * heads)
        for start in range(0, shape[0], step):
            stop = min(start + step, shape[0])
            if len(shape) == 1:
                rows = checkpoint.tensor(part.name, part.layer)[start:stop]
            else:
                rows = checkpoint.rows(part.name, start, stop, part.layer)
            if is_rotated:
                rows = _interleave(rows, arch)
            try:
                yield encode(planned.kind, rows)
            except ValueError as error:
                raise CheckpointError(f"{planned.name}: {error}") from None


def _interleave(rows: F32, arch: Architecture) -> F32:
    """Whole heads, pairs (i, i + half) → (2 i, 2 i + 1); what is not rotated stays."""
    half = arch.rotary_size // 2
    order = np.arange(arch.head_dim)
    order[0 : 2 * half : 2] = np.arange(half)
    order[1 : 2 * half : 2] = np.arange(half, 2 * half)
    heads = rows.reshape(-1, arch.head_dim, *rows.shape[1:])
    return np.ascontiguousarray(heads[:, order]).reshape(rows.shape)


def _header(metadata: Mapping[str, Value], planned: list[_Planned]) -> bytes:
    codes = {kind: code for code, (kind, _, _) in BLOCKS.items()}
    out = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(planned), len(metadata)))
    for key, value in metadata.items():
        out += _string(key.encode()) + _value(value)
    offset = 0
    for each in planned:
        sizes = tuple(reversed(each.shape))
        out += _string(each.name.encode())
        out += struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, codes[each.kind], offset)
        offset += -(-each.size // ALIGNMENT) * ALIGNMENT
    return bytes(out + bytes(-len(out) % ALIGNMENT))


def _string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _value(value: Value) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value) if 0 <= value < 1 << 32 else struct.pack("<Iq", 11, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, bytes):
        return struct.pack("<I", 8) + _string(value)
    if isinstance(value, list):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_string, value))
    kind, code = (6, "f") if value.typecode == "d" else (5, "i")
    return struct.pack(f"<IIQ{len(value)}{code}", 9, kind, len(value), *value)
