"""Who takes part at a shape: each peer at its best settings, and our engine, each with the bits of its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers.environments import Environments
from benchmarks.peers.shapes import Shape


@dataclass(frozen=True, slots=True)
class Contestant:
    """One engine with one kind of weights."""

    name: str
    peer: str
    """Module of this package that measures it."""
    bits: int
    """Of the layers' matrices."""
    head_bits: str
    """Of the (tied) embedding and lm_head: a comparison must say when they differ."""
    model: Callable[[Environments, Shape], Path | str]
    options: dict[str, Any] = field(default_factory=dict)
    """For loading."""
    tunes: dict[str, tuple[dict[str, Any], ...]] = field(default_factory=dict)
    """Options of a measurement to choose from, by op; the best is kept for each kind of work."""
    informational: bool = False
    """True: shown, but in no bar and not in every kind of work."""

    @property
    def is_ours(self) -> bool:
        return self.peer == "ours"


LLAMA_TUNES: dict[str, tuple[dict[str, Any], ...]] = {
    "decode": ({"flash": 1}, {"flash": 0}, {"flash": 1, "unified": 1}),
    "prefill": (
        {"flash": 1, "ubatch": 512},
        {"flash": 0, "ubatch": 512},
        {"flash": 1, "ubatch": 128},
    ),
}


def _llama(kind: str, bits: int, head_bits: str, informational: bool = False) -> Contestant:
    return Contestant(
        f"llama.cpp {kind}",
        "llama",
        bits,
        head_bits,
        lambda environments, shape: environments.gguf(shape, kind),
        tunes=LLAMA_TUNES,
        informational=informational,
    )


def _ours(name: str, bits: int, head_bits: int, sparse: bool = False, informational: bool = False) -> Contestant:
    options = {"bits": bits, "head_bits": head_bits, "sparse": sparse}
    return Contestant(
        f"ours {name}",
        "ours",
        bits,
        str(head_bits),
        lambda environments, shape: shape.name,
        options,
        informational=informational,
    )


PEERS = (
    _llama("Q8_0", 8, "8"),
    _llama("Q4_0", 4, "6 to 8"),
    _llama("Q4_K_M", 4, "6 to 8", informational=True),
    Contestant("openvino int8", "openvino", 8, "8", lambda environments, shape: environments.openvino(shape, 8)),
    Contestant("openvino int4", "openvino", 4, "8", lambda environments, shape: environments.openvino(shape, 4)),
    Contestant("onnxruntime int4", "onnxruntime", 4, "4", lambda environments, shape: environments.onnxruntime(shape)),
)
OURS = (_ours("int8", 8, 8), _ours("int4", 4, 8), _ours("int4-head4", 4, 4))
"""llama.cpp's Q4_0 keeps its head wider, ONNX Runtime's int4 does not: each meets one of ours with its head's bits."""
SPARSE = (
    _ours("int8 skipping", 8, 8, sparse=True),
    _ours("int4 skipping", 4, 8, sparse=True),
    _ours("int4-head4 skipping", 4, 4, sparse=True),
)


def contestants(shape: Shape) -> tuple[Contestant, ...]:
    """Everyone at this shape; exact skipping takes part where the activation makes zeros in number."""
    return PEERS + OURS + (SPARSE if shape.activation == "relu" else ())
