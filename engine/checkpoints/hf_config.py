"""Reads a Hugging Face `config.json` into an `Architecture`.

A configuration is data from a stranger: every number has a range, and an entry that would change the mathematics in a
way no executor knows (another activation, sliding windows, quantised weights …) is refused by name, never ignored.
Defaults are those of the families' configuration classes in transformers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from engine.checkpoints.architecture import Activation, Architecture, CheckpointError, Family, RopeScaling
from engine.checkpoints.json_files import read_object
from engine.checkpoints.rope import yarn_attention_factor

MAX_CONFIG_BYTES = 1 << 20
MAX_ROTARY_ENTRIES = 1 << 27
"""Positions times rotated dimensions: executors may keep tables of this size, whatever the weights weigh."""
MAX_END_TOKENS = 64


@dataclass(frozen=True, slots=True)
class _Defaults:
    """How a family differs from Llama where its configuration says nothing."""

    family: Family
    biases: Literal["qkv", "qkvo", "always"] = "qkvo"
    """What `attention_bias` is about; `always`: query, key and value have biases whatever it says."""
    attention_bias: bool = False
    interleaved: bool = False
    partial_rotary: float = 1.0
    head_dim: int | None = None
    """None: hidden_size / num_attention_heads."""
    kv_heads: int | None = None
    """None: as many as attention heads."""
    eps: float = 1e-6
    tied: bool = False
    qk_norm: bool = False
    sandwich_norm: bool = False


_GLM_EPS = 1.5625e-7
_FAMILIES: Mapping[str, _Defaults] = {
    "glm": _Defaults(
        "glm", "qkv", attention_bias=True, interleaved=True, partial_rotary=0.5, head_dim=128, kv_heads=2, eps=_GLM_EPS
    ),
    "glm4": _Defaults(
        "glm4", "qkv", attention_bias=True, interleaved=True, partial_rotary=0.5, head_dim=128, kv_heads=2,
        eps=_GLM_EPS, sandwich_norm=True,
    ),
    "llama": _Defaults("llama"),
    "sparsellama": _Defaults("llama"),  # ProSparse: Llama with FATReLU
    "qwen2": _Defaults("qwen2", "always", kv_heads=32),
    "qwen3": _Defaults("qwen3", head_dim=128, kv_heads=32, qk_norm=True),
    "minicpm": _Defaults("minicpm", tied=True),
}  # fmt: skip
_ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu", "swish": "silu", "relu": "relu", "fatrelu": "relu", "relu2": "relu2", "relu_squared": "relu2",
    "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
}  # fmt: skip
_ROPE_ENTRIES = frozenset(
    "rope_type rope_theta partial_rotary_factor factor low_freq_factor high_freq_factor attention_factor beta_fast "
    "beta_slow mscale mscale_all_dim truncate finetuned original_max_position_embeddings".split()
)


def read_architecture(directory: Path) -> Architecture:
    """From `config.json`, and the end tokens of `generation_config.json` where there is one. Raises CheckpointError."""
    path = directory / "config.json"
    generation = directory / "generation_config.json"
    ends = None
    if generation.exists() or generation.is_symlink():
        ends = read_object(generation, MAX_CONFIG_BYTES).get("eos_token_id")
    return parse(read_object(path, MAX_CONFIG_BYTES), path, ends)


def parse(raw: Mapping[str, Any], path: Path, more_end_tokens: object = None) -> Architecture:
    """The checked architecture. `path` is for messages. Raises CheckpointError."""
    kind = raw.get("model_type")
    if not isinstance(kind, str) or (own := _FAMILIES.get(kind)) is None:
        raise CheckpointError(f"{path}: model_type is {str(kind)[:100]!r}; readable are {', '.join(_FAMILIES)}")
    fields = _Fields(path, raw)
    _refuse_what_is_unknown(fields)
    heads = fields.whole("num_attention_heads", 1, 1024)
    kv_heads = fields.whole("num_key_value_heads", 1, 1024, own.kv_heads or heads)
    if heads % kv_heads:
        raise CheckpointError(f"{path}: {heads} attention heads are no multiple of {kv_heads} key-value heads")
    hidden = fields.whole("hidden_size", 1, 65_536)
    head_dim = fields.whole("head_dim", 2, 1024, own.head_dim or max(hidden // heads, 2))
    if own.head_dim is None and raw.get("head_dim") is None and hidden % heads:
        raise CheckpointError(f"{path}: hidden_size {hidden} is no multiple of {heads} heads, and no head_dim is given")
    layers = fields.whole("num_hidden_layers", 1, 1024)
    vocabulary = fields.whole("vocab_size", 2, 2_000_000)
    context = fields.whole("max_position_embeddings", 1, 1 << 24)
    rope = _rope_entries(fields)
    rotary = int(head_dim * rope.real("partial_rotary_factor", 0.0, 1.0, own.partial_rotary))
    if rotary % 2:
        raise CheckpointError(f"{path}: partial_rotary_factor rotates {rotary} of {head_dim} dimensions; not even")
    if context * rotary > MAX_ROTARY_ENTRIES:
        raise CheckpointError(f"{path}: max_position_embeddings {context} is too many for {rotary} rotated dimensions")
    theta = rope.real("rope_theta", 1.0, 1e12, 10_000.0)
    activation = fields.word("hidden_act", _ACTIVATIONS, "silu")
    bias = fields.flag("attention_bias", own.attention_bias)
    is_scaled = own.family == "minicpm"
    return Architecture(
        family=own.family,
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=fields.whole("intermediate_size", 1, 1 << 20),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rotary_size=rotary,
        rotary_interleaved=own.interleaved,
        rope_theta=theta,
        rope_scaling=_scaling(rope, context, theta),
        rms_norm_eps=fields.real("rms_norm_eps", 0.0, 1.0, own.eps),
        max_position_embeddings=context,
        activation=_ACTIVATIONS[activation],
        activation_threshold=fields.real("hidden_act_param", 0.0, 1e6, 0.0) if activation == "fatrelu" else 0.0,
        qkv_bias=own.biases == "always" or bias,
        o_bias=own.biases == "qkvo" and bias,
        qk_norm=own.qk_norm,
        sandwich_norm=own.sandwich_norm,
        tie_word_embeddings=fields.flag("tie_word_embeddings", own.tied),
        end_token_ids=_end_tokens(fields, vocabulary, more_end_tokens),
        embedding_scale=fields.real("scale_emb", 0.0, 1e6, 1.0) if is_scaled else 1.0,
        residual_scale=fields.real("scale_depth", 0.0, 1e6, 1.0) / math.sqrt(layers) if is_scaled else 1.0,
        logit_scale=fields.whole("dim_model_base", 1, 65_536, 1) / hidden if is_scaled else 1.0,
    )


@dataclass(frozen=True, slots=True)
class _Fields:
    """Entries of one JSON object, each checked when it is asked for. A missing or null entry is its default."""

    path: Path
    raw: Mapping[str, Any]

    def whole(self, name: str, low: int, high: int, default: int | None = None) -> int:
        value = self._value(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            self.refuse(name, f"a whole number from {low} to {high} is needed")
        return value

    def real(self, name: str, low: float, high: float, default: float | None = None) -> float:
        value = self._value(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
            self.refuse(name, f"a number from {low} to {high} is needed")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._value(name, default)
        if not isinstance(value, bool):
            self.refuse(name, "true or false is needed")
        return value

    def word(self, name: str, words: Mapping[str, Any], default: str) -> str:
        value = self._value(name, default)
        if not isinstance(value, str) or value not in words:
            self.refuse(name, f"supported are {', '.join(words)}")
        return value

    def refuse(self, name: str, remedy: str) -> NoReturn:
        """Raises CheckpointError."""
        raise CheckpointError(f"{self.path}: {name} is {repr(self.raw.get(name))[:100]}; {remedy}")

    def _value(self, name: str, default: Any) -> Any:
        value = self.raw.get(name)
        return default if value is None else value


def _refuse_what_is_unknown(fields: _Fields) -> None:
    if fields.raw.get("quantization_config") is not None:
        raise CheckpointError(f"{fields.path}: quantised weights are not read; export the model as F32, F16 or BF16")
    if fields.flag("mlp_bias", False):
        fields.refuse("mlp_bias", "biases in the feed-forward are not supported")
    kinds = fields.raw.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        fields.refuse("layer_types", "only full_attention is supported")
    layers = fields.whole("num_hidden_layers", 1, 1024)
    if fields.flag("use_sliding_window", False) and fields.whole("max_window_layers", 0, 1024, 28) < layers:
        fields.refuse("use_sliding_window", "sliding windows are not supported")
    if fields.whole("num_experts", 0, 1 << 20, 0):
        fields.refuse("num_experts", "mixtures of experts are not supported")


def _rope_entries(fields: _Fields) -> _Fields:
    """`rope_parameters` (transformers 5), `rope_scaling` (before) and the older entries beside them, as one object."""
    merged: dict[str, Any] = {}
    for name in ("rope_parameters", "rope_scaling"):
        given = fields.raw.get(name)
        if given is None:
            continue
        if not isinstance(given, dict):
            raise CheckpointError(f"{fields.path}: {name} is {type(given).__name__}; an object is needed")
        entries = dict(given)
        if "type" in entries:
            entries.setdefault("rope_type", entries["type"])
            del entries["type"]
        for key, value in entries.items():
            if key not in _ROPE_ENTRIES:
                raise CheckpointError(f"{fields.path}: {name}: {key[:100]!r} is not supported")
            if merged.setdefault(key, value) != value:
                raise CheckpointError(f"{fields.path}: rope_parameters and rope_scaling differ in {key}")
    for key in ("rope_theta", "partial_rotary_factor"):
        if merged.get(key) is None and fields.raw.get(key) is not None:
            merged[key] = fields.raw[key]
    if fields.raw.get("original_max_position_embeddings") is not None:
        merged["original_max_position_embeddings"] = fields.raw["original_max_position_embeddings"]
    return _Fields(fields.path, merged)


def _scaling(rope: _Fields, context: int, theta: float) -> RopeScaling:
    kinds = {"default": None, "linear": None, "llama3": None, "yarn": None}
    kind = rope.word("rope_type", kinds, "default")
    if kind == "default":
        return RopeScaling()
    factor = rope.real("factor", 1.0, 1e6)
    if kind == "linear":
        return RopeScaling(kind="linear", factor=factor)
    original = rope.whole("original_max_position_embeddings", 1, 1 << 24, context)
    if kind == "llama3":
        low = rope.real("low_freq_factor", 1e-6, 1e6)
        high = rope.real("high_freq_factor", 1e-6, 1e6)
        if high <= low:
            rope.refuse("high_freq_factor", f"more than low_freq_factor, {low}, is needed")
        return RopeScaling("llama3", factor, low, high, original)
    if not rope.flag("truncate", True):
        rope.refuse("truncate", "only true is supported")
    if theta <= 1:
        rope.refuse("rope_theta", "yarn needs more than 1")
    mscale, all_dim = rope.real("mscale", 0.0, 1e6, 0.0), rope.real("mscale_all_dim", 0.0, 1e6, 0.0)
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_context=original,
        beta_fast=rope.real("beta_fast", 1e-6, 1e6, 32.0),
        beta_slow=rope.real("beta_slow", 1e-6, 1e6, 1.0),
        attention_factor=rope.real("attention_factor", 0.0, 1e6, yarn_attention_factor(factor, mscale, all_dim)),
    )


def _end_tokens(fields: _Fields, vocabulary: int, more: object) -> tuple[int, ...]:
    """Both files' end tokens: chat models often name the end of a turn in the second only."""
    found: dict[int, None] = {}
    for given in (fields.raw.get("eos_token_id"), more):
        ends: list[Any] = given if isinstance(given, list) else [] if given is None else [given]
        if len(ends) > MAX_END_TOKENS or not all(type(token) is int and 0 <= token < vocabulary for token in ends):
            text = repr(given)[:100]
            raise CheckpointError(f"{fields.path.parent}: eos_token_id is {text}; ids below vocab_size are needed")
        found |= dict.fromkeys(ends)
    return tuple(found)
