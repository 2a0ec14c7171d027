"""What a decoder-only transformer of the GLM and Llama families is, whichever file it came from.

Readers (safetensors, GGUF) produce an `Architecture` and a `Checkpoint`; executors and exporters consume them. Names
follow the Hugging Face configuration where it has one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from engine.checkpoints.errors import CheckpointError as CheckpointError

F32 = npt.NDArray[np.float32]

Family = Literal["glm", "glm4", "llama", "qwen2", "qwen3", "minicpm"]
Activation = Literal["silu", "relu", "relu2", "gelu_tanh"]


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context; fields beside `kind` belong to some kinds only.

    linear: frequencies / factor. llama3: by wavelength, between `low_freq_factor` and `high_freq_factor` of
    `original_context`. yarn: arXiv 2309.00071, with `beta_fast`, `beta_slow` and `attention_factor` on cos and sin.
    factors: each pair's frequency / its own factor (how GGUF files say llama3).
    """

    kind: Literal["none", "linear", "llama3", "yarn", "factors"] = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    factors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Architecture:
    """One model's shape and arithmetic.

    A layer computes, with `norm` an RMSNorm:
    h += residual_scale · post_attention_norm?(o(attention(rope(qk_norm?(qkv(input_norm(h)))))))
    h += residual_scale · post_mlp_norm?(down(activation(gate(x)) · up(x))),  x = post_norm(h)
    and the logits are logit_scale · head(norm(h)); the first h is embedding_scale · embedding[token].
    """

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_size: int
    """Leading dimensions of each head that are rotated; even."""
    rotary_interleaved: bool
    """True: pairs (0,1), (2,3) … (GLM). False: pairs (i, i + rotary_size/2) (Llama, Qwen)."""
    rope_theta: float
    rope_scaling: RopeScaling
    rms_norm_eps: float
    max_position_embeddings: int
    activation: Activation
    activation_threshold: float
    """For relu: inputs up to this value give 0 (FATReLU, arXiv 2402.13516); 0 is plain ReLU."""
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    """RMSNorm of each head's query and key before rotation (Qwen3)."""
    sandwich_norm: bool
    """Norms after attention and after the feed-forward too (GLM-4-0414)."""
    tie_word_embeddings: bool
    end_token_ids: tuple[int, ...]
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0

    @property
    def parameters(self) -> int:
        """Number of weights; a tied head counts once."""
        hidden, query = self.hidden_size, self.num_attention_heads * self.head_dim
        qkv = query + 2 * self.num_key_value_heads * self.head_dim
        layer = (2 + qkv + query + 3 * self.intermediate_size) * hidden
        layer += (qkv if self.qkv_bias else 0) + (hidden if self.o_bias else 0)
        layer += (2 * self.head_dim if self.qk_norm else 0) + (2 * hidden if self.sandwich_norm else 0)
        tables = (1 if self.tie_word_embeddings else 2) * self.vocab_size * hidden
        return self.num_hidden_layers * layer + hidden + tables


GLOBAL_TENSORS = ("embedding", "norm", "head")
LAYER_TENSORS = (
    "input_norm", "q", "k", "v", "q_bias", "k_bias", "v_bias", "q_norm", "k_norm", "o", "o_bias",
    "post_attention_norm", "post_norm", "gate", "up", "down", "post_mlp_norm",
)  # fmt: skip
"""Canonical names; which exist follows from the Architecture. `head` is absent when tied."""


def tensor_shape(arch: Architecture, name: str) -> tuple[int, ...]:
    """Shape of a canonical tensor, [out, in] for matrices as in Hugging Face files. Raises KeyError."""
    hidden, size = arch.hidden_size, arch.head_dim
    query, key = arch.num_attention_heads * size, arch.num_key_value_heads * size
    return {
        "embedding": (arch.vocab_size, hidden),
        "head": (arch.vocab_size, hidden),
        "norm": (hidden,),
        "input_norm": (hidden,),
        "post_norm": (hidden,),
        "post_attention_norm": (hidden,),
        "post_mlp_norm": (hidden,),
        "q": (query, hidden),
        "k": (key, hidden),
        "v": (key, hidden),
        "q_bias": (query,),
        "k_bias": (key,),
        "v_bias": (key,),
        "q_norm": (size,),
        "k_norm": (size,),
        "o": (hidden, query),
        "o_bias": (hidden,),
        "gate": (arch.intermediate_size, hidden),
        "up": (arch.intermediate_size, hidden),
        "down": (hidden, arch.intermediate_size),
    }[name]


def present_tensors(arch: Architecture) -> tuple[str, ...]:
    """Canonical per-layer names this architecture has, in LAYER_TENSORS order."""
    absent: set[str] = set()
    if not arch.qkv_bias:
        absent |= {"q_bias", "k_bias", "v_bias"}
    if not arch.o_bias:
        absent.add("o_bias")
    if not arch.qk_norm:
        absent |= {"q_norm", "k_norm"}
    if not arch.sandwich_norm:
        absent |= {"post_attention_norm", "post_mlp_norm"}
    return tuple(name for name in LAYER_TENSORS if name not in absent)


class Checkpoint(Protocol):
    """An opened model: shapes were checked against `architecture` when it was opened; tensors are read on demand."""

    @property
    def architecture(self) -> Architecture: ...

    @property
    def weight_files_digest(self) -> str:
        """`sha256:` and hexadecimal digits over the weight files' bytes; slow the first time for large files."""

    def tensor(self, name: str, layer: int | None = None) -> F32:
        """A canonical tensor as contiguous float32. Raises CheckpointError (also for NaN or infinity)."""

    def rows(self, name: str, start: int, stop: int, layer: int | None = None) -> F32:
        """Rows `start:stop` of a matrix, so that a large one never is in memory whole. Raises CheckpointError."""

    def close(self) -> None: ...
