"""The model shapes that peers and our engine are compared at; weights are random, only the sizes are real.

Read by every process of the comparison, so it needs the standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Shape:
    """One decoder-only transformer, in the names of `engine.checkpoints.architecture`."""

    name: str
    family: Literal["qwen2", "glm", "llama"]
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    activation: Literal["silu", "relu"] = "silu"
    tie_word_embeddings: bool = True
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    is_cache_resident: bool = False
    """True: the packed weights fit the last-level cache, so results are reported apart."""

    @property
    def qkv_bias(self) -> bool:
        return self.family == "qwen2"

    @property
    def rotary_size(self) -> int:
        return self.head_dim // 2 if self.family == "glm" else self.head_dim

    @property
    def layer_parameters(self) -> int:
        """Weights in the matrices of one layer; norms and biases are left out (below 0.1 %)."""
        query, key = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return self.hidden_size * (2 * query + 2 * key + 3 * self.intermediate_size)

    @property
    def head_parameters(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        tables = 1 if self.tie_word_embeddings else 2
        return self.num_hidden_layers * self.layer_parameters + tables * self.head_parameters


SHAPES = {
    shape.name: shape
    for shape in (
        # Qwen2.5-0.5B.
        Shape("q05", "qwen2", 896, 24, 14, 2, 64, 4864, 151936, rope_theta=1e6, rms_norm_eps=1e-6),
        # GLM-edge-1.5B-like: half of each head is rotated.
        Shape("g15", "glm", 2048, 28, 16, 4, 128, 6144, 59264),
        # MiniCPM-S-1B-like, in plain Llama form. Peers run it with SiLU: a dense feed-forward costs them the same.
        Shape("s14", "llama", 1536, 52, 24, 8, 64, 3840, 73440, activation="relu"),
        # The shape of models/glm-tiny.
        Shape("glm-tiny", "glm", 384, 6, 6, 2, 64, 1024, 4096, activation="relu", is_cache_resident=True),
    )
}
