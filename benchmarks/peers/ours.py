"""Our engine as a measured process, in the mesh's own environment: the native executor, stepped as the loop steps it.

Like the peers' processes it includes the greedy choice of the next token in each step. Weights are random.
"""

from __future__ import annotations

import time
from typing import Any

import autoglm_kernels as kernels
import numpy as np

from benchmarks import random_models
from benchmarks.peers.protocol import serve
from benchmarks.peers.shapes import SHAPES
from engine.checkpoints.packed import layout_of, shares_head
from engine.executors.interface import F32, Span, Wants
from engine.executors.native import NativeExecutor
from engine.precision.plan import Plan, plan_for
from engine.runtime.sampling import NOTHING_SEEN, Sampling, draw

POSITIONS = 4096
INACTIVE = 0.88
"""Share of gates that give zero where skipping is measured: that of published ReLU-family models."""
GREEDY = Sampling(temperature=0.0)


class Ours:
    """Models are names of shapes; options: `bits` (8 or 4), `head_bits` (8 or 4), `sparse` (exact skipping)."""

    def __init__(self) -> None:
        self._executor: NativeExecutor | None = None
        self._random = np.random.default_rng(1)

    def load(self, model: str, threads: int, options: dict[str, Any]) -> dict[str, Any]:
        shape, is_sparse = SHAPES[model], options.get("sparse", False)
        arch = random_models.architecture(shape)
        plan = plan_for(_plan_name(options["bits"], options["head_bits"]), arch, is_sparse)
        inactive = INACTIVE if is_sparse else None
        self._executor = random_models.executor(shape, plan, threads, context=POSITIONS, inactive=inactive)
        active = random_models.active_share(self._executor) if is_sparse else 1.0
        self.prefill(32, {})
        return {
            "plan": plan.identity,
            "kernels": str(kernels.available()),
            "dense_bytes": read_bytes(self._executor, plan, 1.0),
            "active_share": round(active, 4),
            "model_bytes": read_bytes(self._executor, plan, active),
            "prefill_chunk": self._executor.max_rows,
        }

    def decode(self, prompt: int, new: int, batch: int, options: dict[str, Any]) -> list[float]:
        executor = self._loaded()
        each = -(-(prompt + new + 8) // executor.block_tokens)
        pages = [list(range(number * each, (number + 1) * each)) for number in range(batch)]
        first = self._feed(self._tokens(prompt), pages[0])
        for page in range(-(-prompt // executor.block_tokens)):
            # Other sequences get copies, as llama.cpp's do: the steps read as much as with other prompts.
            payload = executor.read_page(pages[0][page])
            for own in pages[1:]:
                executor.write_page(own[page], payload)
        tokens = [first, *self._tokens(batch - 1)]
        took = []
        for step in range(new):
            began = time.perf_counter()
            spans = [Span([token], prompt + step, own, Wants.LAST) for token, own in zip(tokens, pages, strict=True)]
            tokens = [_greedy(logits) for logits in executor.step(spans)]
            took.append(time.perf_counter() - began)
        return took

    def prefill(self, tokens: int, options: dict[str, Any]) -> float:
        prompt = self._tokens(tokens)
        began = time.perf_counter()
        self._feed(prompt, list(range(-(-tokens // self._loaded().block_tokens))))
        return time.perf_counter() - began

    def _feed(self, tokens: list[int], pages: list[int]) -> int:
        """Computes the prompt in chunks; the token after it."""
        executor = self._loaded()
        chunk, logits = executor.max_rows, None
        for start in range(0, len(tokens), chunk):
            part = tokens[start : start + chunk]
            wants = Wants.LAST if start + chunk >= len(tokens) else Wants.NONE
            (logits,) = executor.step([Span(part, start, pages, wants)])
        return _greedy(logits)

    def _tokens(self, count: int) -> list[int]:
        chosen: list[int] = self._random.integers(0, self._loaded().vocab_size, count).tolist()
        return chosen

    def _loaded(self) -> NativeExecutor:
        assert self._executor is not None
        return self._executor


def read_bytes(executor: NativeExecutor, plan: Plan, active: float) -> int:
    """Weights that one decoded token reads when `active` of the neurons are computed; of an own embedding one row."""
    total = 0.0
    for entry in layout_of(executor.architecture, plan):
        role = entry.name.rpartition(".")[2]
        if role == "embedding" and not shares_head(executor.architecture, plan):
            continue
        if plan.skips_neurons and role == "up":
            total += active * (entry.data_bytes + entry.scale_bytes)
        elif plan.skips_neurons and role == "down":
            total += active * entry.data_bytes + entry.scale_bytes
        else:
            total += entry.data_bytes + entry.scale_bytes
    return int(total)


def _plan_name(bits: int, head_bits: int) -> str:
    return {(8, 8): "int8", (4, 8): "int4", (4, 4): "int4-head4"}[bits, head_bits]


def _greedy(logits: F32 | None) -> int:
    assert logits is not None
    return draw(logits[0], GREEDY, NOTHING_SEEN, 0)


if __name__ == "__main__":
    serve(Ours())
