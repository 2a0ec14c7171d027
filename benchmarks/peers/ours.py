"""Our engine as a measured process, in the mesh's own environment.

`load`, `decode` and `prefill` are the only places that know the engine; until they do, its rows say "not measured".
"""

from __future__ import annotations

from typing import Any

from benchmarks.peers.protocol import serve
from benchmarks.peers.shapes import SHAPES, Shape


class Ours:
    """Models are named SHAPE or a folder; options: `bits` (8 or 4), `head_bits`, `sparse` (exact skipping)."""

    def load(self, model: str, threads: int, options: dict[str, Any]) -> dict[str, Any]:
        return load(SHAPES[model], threads, **options)

    def decode(self, prompt: int, new: int, batch: int, options: dict[str, Any]) -> list[float]:
        return decode(batch, prompt, new)

    def prefill(self, tokens: int, options: dict[str, Any]) -> float:
        return prefill(tokens)


def load(shape: Shape, threads: int, bits: int, head_bits: int | None = None, sparse: bool = False) -> dict[str, Any]:
    """Random weights of `shape`, packed; returns facts, among them `model_bytes` that one decoded token reads."""
    raise NotImplementedError("native engine")


def decode(batch: int, prompt: int, new: int) -> list[float]:
    """Seconds of each of `new` greedy steps of `batch` sequences after `prompt` random tokens each."""
    raise NotImplementedError("native engine")


def prefill(tokens: int) -> float:
    """Seconds from an empty cache to the logits after `tokens` random tokens."""
    raise NotImplementedError("native engine")


if __name__ == "__main__":
    serve(Ours())
