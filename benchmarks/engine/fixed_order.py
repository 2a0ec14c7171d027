"""What one fixed order for every sum costs: our steps beside torch's matrix products of the same shapes.

torch picks the order that is fastest on this processor. Only the products of q05's layers and head are timed there, no
attention and no norms, so its side is flattered. Needs torch (dependency group numerics); without it: not measured.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from importlib import util
from typing import Any

from benchmarks import random_models
from benchmarks.harness import Bar
from benchmarks.peers.shapes import SHAPES, Shape
from engine.executors.interface import Span, Wants
from engine.precision.plan import PLANS

ROWS = (1, 8, 256)


def ours(shape: Shape, plan: str, rows: int, repeats: int) -> float:
    """Median seconds of a step of `rows` prompt tokens, one of them with logits."""
    executor = random_models.executor(shape, PLANS[plan], 2)
    pages = list(range(-(-rows // 16)))
    span = Span([8 + number for number in range(rows)], 0, pages, Wants.LAST)
    return _median(lambda: executor.step([span]), repeats)


def torchs(shape: Shape, kind: str, rows: int, repeats: int) -> float:
    """Median seconds of the products alone, in torch."""
    import torch

    torch.set_num_threads(2)
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    query = shape.num_attention_heads * shape.head_dim
    key = shape.num_key_value_heads * shape.head_dim
    hidden, inner = shape.hidden_size, shape.intermediate_size
    sizes = [(hidden, query + 2 * key), (query, hidden), (hidden, 2 * inner), (inner, hidden)]
    layers: list[Any] = [
        torch.nn.Linear(a, b, bias=False, dtype=dtype) for _ in range(shape.num_hidden_layers) for a, b in sizes
    ]
    head: Any = torch.nn.Linear(hidden, shape.vocab_size, bias=False, dtype=dtype)
    if kind == "int8":
        quantise = torch.ao.quantization.quantize_dynamic
        layers = [quantise(torch.nn.Sequential(layer), dtype=torch.qint8) for layer in layers]
        head = quantise(torch.nn.Sequential(head), dtype=torch.qint8)
    inputs = {size: torch.randn(rows, size, dtype=dtype) for size in {hidden, query, inner}}
    widths = [a for _ in range(shape.num_hidden_layers) for a, _ in sizes]

    def step() -> None:
        for layer, width in zip(layers, widths, strict=True):
            layer(inputs[width])
        head(inputs[hidden][-1:])

    with torch.inference_mode():
        return _median(step, repeats)


def _median(run: Callable[[], object], repeats: int) -> float:
    run()
    took = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        took.append(time.perf_counter() - began)
    return statistics.median(took)


def drill(quick: bool) -> tuple[list[Bar], dict[str, Any]]:
    """No bar: figures for the record."""
    if not util.find_spec("torch"):
        return [], {"not_measured": "torch is not installed"}
    shape, repeats = SHAPES["q05"], 2 if quick else 5
    details: dict[str, Any] = {}
    for kind in ("int8", "bf16"):
        for rows in ROWS[: 2 if quick else None]:
            mine, theirs = ours(shape, kind, rows, repeats), torchs(shape, kind, rows, repeats)
            details[f"{kind}, {rows} rows"] = {"ours_s": mine, "torch_products_s": theirs, "ratio": theirs / mine}
            print(f"  {kind}, {rows} rows: ours {mine * 1e3:.1f} ms, torch {theirs * 1e3:.1f} ms", flush=True)
    return [], details
