"""A GGUF file, opened as a `Checkpoint`: metadata to `Architecture`, blocks to float32 rows.

Names and meanings follow llama.cpp's converters. Its "llama" and "minicpm" files keep query and key rows in rotary
pairs (0,1), (2,3) …; such a model is given back as `rotary_interleaved`, which computes the same logits. What GGUF has
no word for stands under keys of our own, `autoglm.*`, that `export_gguf` writes: the activation, all end tokens.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.checkpoints.architecture import (
    F32,
    GLOBAL_TENSORS,
    LAYER_TENSORS,
    Activation,
    Architecture,
    CheckpointError,
    Family,
    RopeScaling,
    present_tensors,
    tensor_shape,
)
from engine.checkpoints.digest_cache import DigestCache, WeightsDigest
from engine.checkpoints.gguf_blocks import dequantise
from engine.checkpoints.gguf_header import BLOCKS, Header, Stored, open_gguf_file, parse_header
from engine.checkpoints.hf_config import MAX_END_TOKENS, MAX_ROTARY_ENTRIES
from engine.checkpoints.rope import yarn_attention_factor

PIECE_ELEMENTS = 1 << 20
"""Read and converted at once: bounds what a large tensor takes beside its result."""

FAMILIES: Mapping[str, tuple[Family, bool]] = {
    "llama": ("llama", True), "minicpm": ("minicpm", True), "chatglm": ("glm", True), "glm4": ("glm4", True),
    "qwen2": ("qwen2", False), "qwen3": ("qwen3", False),
}  # fmt: skip
"""general.architecture → (family, whether rotary pairs are interleaved)."""
FUSED = ("glm", "glm4")
"""Families that keep gate and up, in that order, as one matrix, `ffn_up`; query, key and value may be one as well."""

GLOBAL_NAMES = {"embedding": "token_embd.weight", "norm": "output_norm.weight", "head": "output.weight"}
LAYER_NAMES = {
    "input_norm": "attn_norm.weight",
    "q": "attn_q.weight",
    "k": "attn_k.weight",
    "v": "attn_v.weight",
    "q_bias": "attn_q.bias",
    "k_bias": "attn_k.bias",
    "v_bias": "attn_v.bias",
    "q_norm": "attn_q_norm.weight",
    "k_norm": "attn_k_norm.weight",
    "o": "attn_output.weight",
    "o_bias": "attn_output.bias",
    "post_attention_norm": "post_attention_norm.weight",
    "post_norm": "ffn_norm.weight",
    "gate": "ffn_gate.weight",
    "up": "ffn_up.weight",
    "down": "ffn_down.weight",
    "post_mlp_norm": "post_ffw_norm.weight",
}
ROPE_FACTORS = "rope_freqs.weight"
END_TOKEN_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_ACTIVATIONS: Mapping[str, Activation] = {"silu": "silu", "relu": "relu", "relu2": "relu2", "gelu_tanh": "gelu_tanh"}


@dataclass(frozen=True, slots=True)
class _Place:
    """Rows `first` to `first + rows` of a stored tensor."""

    name: str
    first: int
    rows: int


def open_gguf(path: Path, max_bytes: int = 64 << 30) -> GgufCheckpoint:
    """Raises CheckpointError, also when the file has more than `max_bytes`. The caller closes it."""
    return GgufCheckpoint(path, max_bytes, DigestCache(None))


class GgufCheckpoint:
    """Implements `engine.checkpoints.architecture.Checkpoint`. Reading is safe from several threads."""

    def __init__(self, path: Path, max_bytes: int, digests: DigestCache) -> None:
        """Raises CheckpointError."""
        self.path = path
        self._digest = WeightsDigest(digests, [path])
        self._file = open_gguf_file(path)
        try:
            self.header = parse_header(self._file, path)
            if self.header.size > max_bytes:
                raise CheckpointError(f"{path}: {self.header.size} bytes, at most {max_bytes} are allowed")
            self._architecture = self._read_architecture()
            self._check()
        except BaseException:
            self._file.close()
            raise

    @property
    def architecture(self) -> Architecture:
        return self._architecture

    @property
    def weight_files_digest(self) -> str:
        return self._digest()

    def tensor(self, name: str, layer: int | None = None) -> F32:
        place = self._place(name, layer)
        return self._read(place.name, place.first, place.first + place.rows)

    def rows(self, name: str, start: int, stop: int, layer: int | None = None) -> F32:
        place = self._place(name, layer)
        if not 0 <= start <= stop <= place.rows:
            raise CheckpointError(f"{name} has rows 0 to {place.rows}, not {start} to {stop}")
        return self._read(place.name, place.first + start, place.first + stop)

    def close(self) -> None:
        self._file.close()

    def _read(self, name: str, start: int, stop: int) -> F32:
        """Rows of a stored tensor; a vector's rows are its numbers, whatever its blocks."""
        stored = self.header.tensors[name]
        _, elements, size = next(each for each in BLOCKS.values() if each[0] == stored.kind)
        if len(stored.shape) == 1 and elements > 1:
            return self._read_row(name, stored, stored.begin, stored.shape[0])[start:stop].copy()
        row = math.prod(stored.shape[1:])
        out = np.empty((stop - start, *stored.shape[1:]), dtype=np.float32)
        flat = out.reshape(-1)
        step = PIECE_ELEMENTS  # a multiple of every block
        for first in range(0, flat.size, step):
            piece = flat[first : first + step]
            piece[:] = self._read_row(name, stored, stored.begin + (start * row + first) // elements * size, piece.size)
        return out

    def _read_row(self, name: str, stored: Stored, position: int, count: int) -> F32:
        _, elements, size = next(each for each in BLOCKS.values() if each[0] == stored.kind)
        data = np.empty(count // elements * size, dtype=np.uint8)
        view, done = data.data, 0
        try:
            while done < len(view):
                got = os.preadv(self._file.fileno(), [view[done:]], position + done)
                if got == 0:
                    raise CheckpointError(f"{self.path}: ends inside {name}: it was cut short while it was read")
                done += got
        except (OSError, ValueError) as error:  # ValueError: closed
            raise CheckpointError(f"{self.path}: {name} cannot be read ({error})") from None
        values = dequantise(stored.kind, data)
        if not np.isfinite(values).all():
            raise CheckpointError(f"{self.path}: {name} holds NaN or infinity")
        return values

    def _place(self, name: str, layer: int | None) -> _Place:
        """Where a canonical tensor is stored. Raises CheckpointError for one that this architecture has not."""
        arch, stored = self._architecture, self.header.tensors
        if layer is None:
            if name not in GLOBAL_TENSORS or (name == "head" and arch.tie_word_embeddings):
                raise CheckpointError(f"this model has no tensor {name}")
            return _Place(GLOBAL_NAMES[name], 0, tensor_shape(arch, name)[0])
        if name not in LAYER_TENSORS or name not in present_tensors(arch) or not 0 <= layer < arch.num_hidden_layers:
            raise CheckpointError(f"this model has no tensor {name} in layer {layer}")
        rows = tensor_shape(arch, name)[0]
        stem = f"blk.{layer}."
        if arch.family in FUSED:
            if name in ("gate", "up"):
                return _Place(f"{stem}ffn_up.weight", rows if name == "up" else 0, rows)
            part, _, bias = name.partition("_")
            fused = f"{stem}attn_qkv.{bias or 'weight'}"
            if part in ("q", "k", "v") and bias in ("", "bias") and fused in stored:
                key = tensor_shape(arch, "k")[0]
                query = tensor_shape(arch, "q")[0]
                return _Place(fused, {"q": 0, "k": query, "v": query + key}[part], rows)
        return _Place(stem + LAYER_NAMES[name], 0, rows)

    def _check(self) -> None:
        """All tensors are there, in the shapes the metadata want."""
        arch, stored = self._architecture, self.header.tensors
        every: list[tuple[str, int | None]] = [
            (name, None) for name in GLOBAL_TENSORS if name != "head" or not arch.tie_word_embeddings
        ]
        every += [(name, layer) for layer in range(arch.num_hidden_layers) for name in present_tensors(arch)]
        wanted: dict[str, int] = {}
        for name, layer in every:
            place = self._place(name, layer)
            if place.name not in stored:
                raise CheckpointError(f"{self.path}: tensor {place.name} is missing")
            wanted[place.name] = wanted.get(place.name, 0) + place.rows
            if stored[place.name].shape[1:] != tensor_shape(arch, name)[1:]:
                raise CheckpointError(
                    f"{self.path}: {place.name} has shape {stored[place.name].shape}, "
                    f"the metadata want rows of {tensor_shape(arch, name)[1:]}"
                )
        for stored_name, rows in wanted.items():
            if stored[stored_name].shape[0] != rows:
                raise CheckpointError(
                    f"{self.path}: {stored_name} has {stored[stored_name].shape[0]} rows, the metadata want {rows}"
                )
        if unknown := [name for name in stored if name not in wanted and name != ROPE_FACTORS]:
            raise CheckpointError(f"{self.path}: tensor {unknown[0]!r} has no place in this architecture")

    def _read_architecture(self) -> Architecture:
        header = self.header
        kind = header.text("general.architecture", "") or ""
        if kind not in FAMILIES:
            raise CheckpointError(
                f"{self.path}: general.architecture is {kind[:100]!r}; readable are {', '.join(FAMILIES)}"
            )
        family, interleaved = FAMILIES[kind]
        _refuse_what_is_unknown(header, kind)
        hidden = header.whole(f"{kind}.embedding_length", 1, 65_536)
        layers = header.whole(f"{kind}.block_count", 1, 1024)
        heads = header.whole(f"{kind}.attention.head_count", 1, 1024)
        kv_heads = header.whole(f"{kind}.attention.head_count_kv", 1, 1024, heads)
        if heads % kv_heads:
            raise CheckpointError(f"{self.path}: {heads} attention heads are no multiple of {kv_heads} key-value heads")
        head_dim = header.whole(f"{kind}.attention.key_length", 2, 1024, max(hidden // heads, 2))
        if header.whole(f"{kind}.attention.value_length", 2, 1024, head_dim) != head_dim:
            raise CheckpointError(f"{self.path}: keys and values of different length are not supported")
        rotary = header.whole(f"{kind}.rope.dimension_count", 0, head_dim, head_dim)
        context = header.whole(f"{kind}.context_length", 1, 1 << 24)
        if rotary % 2 or context * rotary > MAX_ROTARY_ENTRIES:
            raise CheckpointError(f"{self.path}: {rotary} rotated dimensions at {context} positions are not supported")
        embedding = header.tensors.get(GLOBAL_NAMES["embedding"])
        if embedding is None or len(embedding.shape) != 2 or not 2 <= embedding.shape[0] <= 2_000_000:
            raise CheckpointError(f"{self.path}: {GLOBAL_NAMES['embedding']} is no matrix of a readable size")
        theta = header.real(f"{kind}.rope.freq_base", 1.0, 1e12, 10_000.0)
        activation = header.text("autoglm.activation", "silu") or ""
        if activation not in _ACTIVATIONS:
            raise CheckpointError(f"{self.path}: autoglm.activation: supported are {', '.join(_ACTIVATIONS)}")
        is_scaled = family == "minicpm"
        fused = "blk.0.attn_qkv.bias" in header.tensors and family in FUSED
        return Architecture(
            family=family,
            vocab_size=embedding.shape[0],
            hidden_size=hidden,
            intermediate_size=header.whole(f"{kind}.feed_forward_length", 1, 1 << 20),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rotary_size=rotary,
            rotary_interleaved=interleaved,
            rope_theta=theta,
            rope_scaling=self._scaling(kind, context, rotary, theta),
            rms_norm_eps=header.real(f"{kind}.attention.layer_norm_rms_epsilon", 0.0, 1.0),
            max_position_embeddings=context,
            activation=_ACTIVATIONS[activation],
            activation_threshold=header.real("autoglm.activation_threshold", 0.0, 1e6, 0.0),
            qkv_bias="blk.0.attn_q.bias" in header.tensors or fused,
            o_bias="blk.0.attn_output.bias" in header.tensors,
            qk_norm=family == "qwen3",
            sandwich_norm=family == "glm4",
            tie_word_embeddings=GLOBAL_NAMES["head"] not in header.tensors,
            end_token_ids=_end_tokens(header, embedding.shape[0]),
            embedding_scale=header.real(f"{kind}.embedding_scale", 0.0, 1e6) if is_scaled else 1.0,
            residual_scale=header.real(f"{kind}.residual_scale", 0.0, 1e6) if is_scaled else 1.0,
            logit_scale=1.0 / header.real(f"{kind}.logit_scale", 1e-6, 1e6) if is_scaled else 1.0,
        )

    def _scaling(self, kind: str, context: int, rotary: int, theta: float) -> RopeScaling:
        header, stem = self.header, f"{kind}.rope.scaling."
        name = header.text(f"{stem}type", "none")
        if ROPE_FACTORS in header.tensors:
            if name != "none" or header.tensors[ROPE_FACTORS].shape != (rotary // 2,):
                raise CheckpointError(f"{self.path}: {ROPE_FACTORS} does not go with the other rotary metadata")
            factors = self._read(ROPE_FACTORS, 0, rotary // 2)
            if (factors < 1e-6).any() or (factors > 1e6).any():
                raise CheckpointError(f"{self.path}: {ROPE_FACTORS} holds factors out of range")
            return RopeScaling(kind="factors", factors=tuple(float(each) for each in factors))
        if name == "none":
            return RopeScaling()
        if name not in ("linear", "yarn"):
            raise CheckpointError(
                f"{self.path}: {stem}type is {str(name)[:100]!r}; none, linear and yarn are supported"
            )
        factor = header.real(f"{stem}factor", 1.0, 1e6)
        if name == "linear":
            return RopeScaling(kind="linear", factor=factor)
        if theta <= 1:
            raise CheckpointError(f"{self.path}: {kind}.rope.freq_base must be more than 1 for yarn")
        # llama.cpp multiplies its attention factor with the paper's.
        own = header.real(f"{stem}attn_factor", 0.0, 1e6, 1.0)
        return RopeScaling(
            kind="yarn",
            factor=factor,
            original_context=header.whole(f"{stem}original_context_length", 1, 1 << 24, context),
            beta_fast=header.real(f"{stem}yarn_beta_fast", 1e-6, 1e6, 32.0),
            beta_slow=header.real(f"{stem}yarn_beta_slow", 1e-6, 1e6, 1.0),
            attention_factor=own * yarn_attention_factor(factor),
        )


def _refuse_what_is_unknown(header: Header, kind: str) -> None:
    """Keys that change the mathematics in a way no executor knows."""
    for name in ("expert_count", "nextn_predict_layers", "attention.max_alibi_bias", "attention.clamp_kqv"):
        if header.real(f"{kind}.{name}", 0.0, 1e9, 0.0) != 0:
            raise CheckpointError(f"{header.path}: {kind}.{name} is not supported")
    for name in ("attn_logit_softcapping", "final_logit_softcapping", "rope.scaling.yarn_log_multiplier"):
        if header.real(f"{kind}.{name}", -1e9, 1e9, 0.0) != 0:
            raise CheckpointError(f"{header.path}: {kind}.{name} is not supported")
    for name in ("attention.scale", "rope.dimension_sections", "rope.scaling.yarn_ext_factor"):
        if f"{kind}.{name}" in header.metadata:
            raise CheckpointError(f"{header.path}: {kind}.{name} is not supported")
    context = header.whole(f"{kind}.context_length", 1, 1 << 24)
    window = header.whole(f"{kind}.attention.sliding_window", 0, 1 << 32, 0)
    if 0 < window < context:
        raise CheckpointError(f"{header.path}: sliding windows are not supported")


def _end_tokens(header: Header, vocabulary: int) -> tuple[int, ...]:
    own = header.numbers("autoglm.end_token_ids")
    if own is None:
        keys = [f"tokenizer.ggml.{name}" for name in END_TOKEN_KEYS]
        own = [header.whole(key, 0, vocabulary - 1) for key in keys if key in header.metadata]
    if len(own) > MAX_END_TOKENS or not all(isinstance(each, int) and 0 <= each < vocabulary for each in own):
        raise CheckpointError(f"{header.path}: autoglm.end_token_ids: ids below {vocabulary} are needed")
    return tuple(dict.fromkeys(int(each) for each in own))
