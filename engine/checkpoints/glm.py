"""Reads a GLM checkpoint in the Hugging Face layout (`GlmForCausalLM`) into float32 arrays.

Model files are data from strangers: sizes are checked against the configuration before anything is allocated, and
every problem is a `CheckpointError` that names the file and the tensor.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  # teaches numpy the name "bfloat16", which safetensors asks for
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from engine.checkpoints.files import open_regular, read_bounded

F32 = npt.NDArray[np.float32]

MAX_CONFIG_BYTES = 1 << 20
MAX_HEADER_BYTES = 4 << 20
MAX_TENSORS = 10_000
MAX_ROTARY_ENTRIES = 1 << 26
"""Positions times rotated dimensions: executors keep tables of this size, whatever the weights weigh."""
DTYPES = ("F32", "F16", "BF16")
"""Others are not weights as they stand (integers need their scales) or would lose bits on the way to float32."""


class CheckpointError(Exception):
    """The files are no usable checkpoint; the text says which file, which tensor and what is wrong."""


@dataclass(frozen=True, slots=True)
class GlmConfig:
    """What the computation needs to know. Names are HF's; `rotary_size` is head_dim · partial_rotary_factor."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_size: int
    rope_theta: float
    rms_norm_eps: float
    max_position_embeddings: int
    hidden_act: str
    attention_bias: bool
    tie_word_embeddings: bool
    end_token_ids: tuple[int, ...]

    @property
    def kv_bytes_per_token(self) -> int:
        """float32 keys and values of one token over all layers."""
        return self.num_hidden_layers * 2 * self.num_key_value_heads * self.head_dim * 4

    @property
    def weight_bytes(self) -> int:
        """float32 weights that the configuration promises, `GlmWeights.resident_bytes` before anything is read."""
        hidden, query = self.hidden_size, self.num_attention_heads * self.head_dim
        qkv = query + 2 * self.num_key_value_heads * self.head_dim
        layer = (2 + qkv + query + 3 * self.intermediate_size) * hidden + (qkv if self.attention_bias else 0)
        return 4 * (self.num_hidden_layers * layer + hidden + 2 * self.vocab_size * hidden)


@dataclass(frozen=True, slots=True)
class Layer:
    """One block. Matrices are [in, out], contiguous, so that `rows @ matrix` streams them."""

    input_norm: F32
    qkv: F32
    qkv_bias: F32 | None
    o: F32
    post_norm: F32
    gate_up: F32
    down: F32


@dataclass(frozen=True, slots=True)
class GlmWeights:
    """A loaded checkpoint."""

    config: GlmConfig
    embedding: F32
    layers: tuple[Layer, ...]
    norm: F32
    head: F32

    @property
    def parameters(self) -> int:
        """Number of weights; a tied head counts once."""
        arrays = [self.embedding, self.norm]
        for layer in self.layers:
            arrays += [layer.input_norm, layer.qkv, layer.o, layer.post_norm, layer.gate_up, layer.down]
            if layer.qkv_bias is not None:
                arrays.append(layer.qkv_bias)
        if not self.config.tie_word_embeddings:
            arrays.append(self.head)
        return sum(array.size for array in arrays)

    @property
    def resident_bytes(self) -> int:
        """Memory of the float32 arrays, the transposed head included."""
        tied_copy = self.head.nbytes if self.config.tie_word_embeddings else 0
        return self.parameters * 4 + tied_copy


def load(directory: Path, max_bytes: int = 64 << 30) -> GlmWeights:
    """Reads `config.json` and `model.safetensors` below `directory`. Raises CheckpointError, also when the float32
    weights would take more than `max_bytes`."""
    config = read_config(directory / "config.json")
    path = directory / "model.safetensors"
    if config.weight_bytes > max_bytes:
        raise CheckpointError(f"{path}: would take {config.weight_bytes} bytes, at most {max_bytes} are allowed")
    try:
        _check_header(path)
        with safe_open(path, framework="np") as file:
            names = set(file.keys())
            if len(names) > MAX_TENSORS:
                raise CheckpointError(f"{path}: {len(names)} tensors, at most {MAX_TENSORS} are read")

            def take(name: str, *shape: int) -> F32:
                if name not in names:
                    raise CheckpointError(f"{path}: tensor {name} is missing")
                stored = file.get_slice(name)
                if (dtype := stored.get_dtype()) not in DTYPES:
                    raise CheckpointError(f"{path}: {name} is {dtype}; this reader takes {', '.join(DTYPES)}")
                seen = tuple(stored.get_shape())
                if seen != shape:
                    raise CheckpointError(f"{path}: {name} has shape {seen}, the configuration wants {shape}")
                array = np.asarray(file.get_tensor(name)).astype(np.float32)
                if not np.isfinite(array).all():
                    raise CheckpointError(f"{path}: {name} holds NaN or infinity")
                return array

            return _assemble(config, take)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None


def _check_header(path: Path) -> None:
    """Parsing a header costs many times its size, so a huge one is refused unread."""
    with open_regular(path) as file:
        size = int.from_bytes(file.read(8), "little")
    if size > MAX_HEADER_BYTES:
        raise CheckpointError(f"{path}: its safetensors header has {size} bytes, at most {MAX_HEADER_BYTES} are read")


def read_config(path: Path) -> GlmConfig:
    """The checked configuration. Raises CheckpointError."""
    try:
        raw = json.loads(read_bounded(path, MAX_CONFIG_BYTES).decode())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(raw, dict) or raw.get("model_type") != "glm":
        kind = raw.get("model_type") if isinstance(raw, dict) else type(raw).__name__
        raise CheckpointError(f"{path}: model_type is {kind!r}; this reader takes 'glm'")
    rope: Mapping[str, Any] = raw.get("rope_parameters") or {}
    scaling: Mapping[str, Any] = raw.get("rope_scaling") or {}  # where older exports say the same
    for name, given in (("rope_parameters", rope), ("rope_scaling", scaling)):
        if not isinstance(given, dict):
            raise CheckpointError(f"{path}: {name} is {type(given).__name__}; an object is needed")
        kind = given.get("rope_type", given.get("type", "default"))
        if kind != "default":
            raise CheckpointError(f"{path}: {name}: rope_type {kind!r} is not supported")

    def number(name: str, low: int, high: int, source: Mapping[str, Any] = raw) -> int:
        value = source.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise CheckpointError(f"{path}: {name} is {value!r}; a whole number from {low} to {high} is needed")
        return value

    def real(name: str, low: float, high: float, default: float) -> float:
        value = rope.get(name, raw.get(name, default))
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
            raise CheckpointError(f"{path}: {name} is {value!r}; a number from {low} to {high} is needed")
        return float(value)

    def flag(name: str) -> bool:
        value = raw.get(name, False)
        if not isinstance(value, bool):
            raise CheckpointError(f"{path}: {name} is {value!r}; true or false is needed")
        return value

    activation = raw.get("hidden_act", "silu")
    if activation not in ("relu", "silu"):
        raise CheckpointError(f"{path}: hidden_act {activation!r} is not supported; relu and silu are")
    ends = raw.get("eos_token_id") or []
    ends = ends if isinstance(ends, list) else [ends]
    vocabulary = number("vocab_size", 2, 2_000_000)
    if len(ends) > 64 or not all(type(token) is int and 0 <= token < vocabulary for token in ends):
        raise CheckpointError(f"{path}: eos_token_id is {ends!r}; ids below vocab_size are needed")
    heads, kv_heads = number("num_attention_heads", 1, 1024), number("num_key_value_heads", 1, 1024)
    if heads % kv_heads:
        raise CheckpointError(f"{path}: {heads} attention heads are no multiple of {kv_heads} key-value heads")
    head_dim = number("head_dim", 2, 1024)
    rotary = int(head_dim * real("partial_rotary_factor", 0.0, 1.0, 0.5))
    context = number("max_position_embeddings", 1, 1 << 20)
    if context * rotary > MAX_ROTARY_ENTRIES:
        raise CheckpointError(f"{path}: max_position_embeddings {context} is too many for {rotary} rotated dimensions")
    return GlmConfig(
        vocab_size=vocabulary,
        hidden_size=number("hidden_size", 1, 65_536),
        intermediate_size=number("intermediate_size", 1, 1 << 20),
        num_hidden_layers=number("num_hidden_layers", 1, 1024),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rotary_size=rotary - rotary % 2,
        rope_theta=real("rope_theta", 1.0, 1e9, 10_000.0),
        rms_norm_eps=real("rms_norm_eps", 0.0, 1.0, 1e-5),
        max_position_embeddings=context,
        hidden_act=activation,
        attention_bias=flag("attention_bias"),
        tie_word_embeddings=flag("tie_word_embeddings"),
        end_token_ids=tuple(ends),
    )


def _assemble(config: GlmConfig, take: Callable[..., F32]) -> GlmWeights:
    hidden, width = config.hidden_size, config.intermediate_size
    query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    layers: list[Layer] = []
    for number in range(config.num_hidden_layers):
        base = f"model.layers.{number}."
        parts = [
            take(f"{base}self_attn.{name}_proj.weight", rows, hidden)
            for name, rows in (("q", query), ("k", key), ("v", key))
        ]
        biases = [
            take(f"{base}self_attn.{name}_proj.bias", rows)
            for name, rows in (("q", query), ("k", key), ("v", key))
            if config.attention_bias
        ]
        layers.append(
            Layer(
                input_norm=take(f"{base}input_layernorm.weight", hidden),
                qkv=np.ascontiguousarray(np.concatenate(parts).T),
                qkv_bias=np.concatenate(biases) if biases else None,
                o=np.ascontiguousarray(take(f"{base}self_attn.o_proj.weight", hidden, query).T),
                post_norm=take(f"{base}post_attention_layernorm.weight", hidden),
                gate_up=np.ascontiguousarray(take(f"{base}mlp.gate_up_proj.weight", 2 * width, hidden).T),
                down=np.ascontiguousarray(take(f"{base}mlp.down_proj.weight", hidden, width).T),
            )
        )
    embedding = take("model.embed_tokens.weight", config.vocab_size, hidden)
    head = embedding if config.tie_word_embeddings else take("lm_head.weight", config.vocab_size, hidden)
    return GlmWeights(
        config=config,
        embedding=embedding,
        layers=tuple(layers),
        norm=take("model.norm.weight", hidden),
        head=np.ascontiguousarray(head.T),
    )
