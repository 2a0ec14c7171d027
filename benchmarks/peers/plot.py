"""The comparison as a picture: a row of bars per shape, and the batch curves. Needs matplotlib (group `bench`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Fixed per engine, so that shapes and runs can be compared at a glance.
COLOURS = {"ours": "#1b6ca8", "llama.cpp": "#d9822b", "openvino": "#5c9e5c", "onnxruntime": "#8a6fb0"}


def draw(shapes: dict[str, Any], target: Path) -> None:
    """`shapes`: the `shapes` object of the result file. Writes SVG or PNG, by the name's ending."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    works = ("decode batch 1", "decode batch 8", "prefill 512", "prefill 2048")
    rows = max(1, len(shapes))
    figure, axes = pyplot.subplots(rows, len(works) + 1, figsize=(4 * (len(works) + 1), 3.2 * rows), squeeze=False)
    for row, (name, shape) in zip(axes, shapes.items(), strict=False):
        for axis, work in zip(row, works, strict=False):
            _bars(axis, f"{name}, {work}", shape["tokens_per_s"].get(work, {}))
        _curve(row[-1], name, shape["tokens_per_s"])
    figure.suptitle("Tokens per second, all sequences together; lines are quartiles")
    figure.tight_layout()
    figure.savefig(target, dpi=120)
    pyplot.close(figure)


def _bars(axis: Any, title: str, measured: dict[str, dict[str, float]]) -> None:
    names = list(measured)
    medians = [measured[name]["median"] for name in names]
    below = [measured[name]["median"] - measured[name]["low"] for name in names]
    above = [measured[name]["high"] - measured[name]["median"] for name in names]
    axis.barh(names, medians, xerr=(below, above) if names else None, color=[_colour(name) for name in names])
    axis.set_title(title, fontsize=9)
    axis.tick_params(labelsize=7)
    axis.invert_yaxis()


def _curve(axis: Any, shape: str, works: dict[str, dict[str, dict[str, float]]]) -> None:
    lines: dict[str, list[tuple[int, float]]] = {}
    for work, measured in works.items():
        if work.startswith("decode batch "):
            for name, found in measured.items():
                lines.setdefault(name, []).append((int(work.rpartition(" ")[2]), found["median"]))
    long = [(name, sorted(points)) for name, points in sorted(lines.items()) if len(points) > 2]
    for number, (name, points) in enumerate(long):
        style = ("-", "--", ":", "-.")[number % 4]  # the colour is the engine's, whatever its weights
        axis.plot(*zip(*points, strict=True), style, marker="o", markersize=3, label=name, color=_colour(name))
    axis.set_title(f"{shape}, decode by batch", fontsize=9)
    axis.tick_params(labelsize=7)
    if axis.lines:
        axis.set_xscale("log", base=2)
        axis.legend(fontsize=7)


def _colour(name: str) -> str:
    return next((colour for peer, colour in COLOURS.items() if name.startswith(peer)), "#666666")
