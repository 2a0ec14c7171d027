"""The comparison as a Markdown page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.peers.contestants import Contestant
from benchmarks.peers.interleave import Block, Work
from benchmarks.peers.shapes import Shape
from benchmarks.peers.summary import Bar, Spread, figures, wall_shares


def page(sections: Sequence[str], walls: Sequence[dict[str, Any]], bars: Sequence[Bar], machine: str) -> str:
    """The whole page."""
    lines = ["# Our engine beside its peers", "", f"Machine: {machine}. Tokens per second, median (quartiles).", ""]
    lines += ["## The wall", "", "| working set | threads | GB/s |", "| --- | --- | --- |"]
    lines += [
        f"| {wall['working_set_bytes'] / 2**20:.0f} MiB | {wall['threads']} | {wall['gb_per_s']} |" for wall in walls
    ]
    lines += ["", *sections, "## Bars", "", "| bar | value | target | |", "| --- | --- | --- | --- |"]
    lines += [f"| {bar.name} | {bar.value} | {bar.target} | {'ok' if bar.is_met else 'missed'} |" for bar in bars]
    return "\n".join(lines) + "\n"


def section(
    shape: Shape,
    works: Sequence[Work],
    blocks: dict[str, list[Block]],
    taking_part: Sequence[Contestant],
    model_bytes: dict[str, int],
    reasons: dict[str, str],
) -> str:
    """One shape: a row per contestant, a column per kind of work, then the batch curve."""
    regime = "cache-resident" if shape.is_cache_resident else "cold weights"
    lines = [f"## {shape.name}: {shape.parameters / 1e6:.0f} M weights, {regime}", ""]
    measured = {work.name: figures(blocks.get(work.name, [])) for work in works}
    columns = [work for work in works if work.for_bars]
    shares = wall_shares(blocks.get("decode batch 1", []), 1, model_bytes)
    heads = " | ".join(work.name for work in columns)
    lines += [f"| | bits (head) | MB | {heads} | GB/s, share of the wall |", "| --- " * (4 + len(columns)) + "|"]
    for c in taking_part:
        cells = " | ".join(_cell(measured[work.name].get(c.name)) for work in columns)
        share = f"{shares[c.name][0]:.1f}, {100 * shares[c.name][1]:.0f} %" if c.name in shares else "–"
        size = f"{model_bytes[c.name] / 1e6:.0f}" if c.name in model_bytes else "–"
        lines.append(f"| {c.name} | {c.bits} ({c.head_bits}) | {size} | {cells} | {share} |")
    curve = sorted((work for work in works if work.op == "decode"), key=lambda work: work.batch)
    drawn = [c for c in taking_part if any(c.name in measured[w.name] for w in works if not w.for_bars)]
    if drawn:
        lines += ["", "Sum over the batch:", "", "| batch | " + " | ".join(str(work.batch) for work in curve) + " |"]
        lines.append("| --- " * (1 + len(curve)) + "|")
        for c in drawn:
            lines.append(f"| {c.name} | " + " | ".join(_cell(measured[w.name].get(c.name)) for w in curve) + " |")
    if reasons:
        lines += ["", *(f"- {name}: not measured: {reason}" for name, reason in sorted(reasons.items()))]
    return "\n".join([*lines, ""])


def _cell(found: Spread | None) -> str:
    if found is None:
        return "not measured"
    digits = 1 if found.median < 100 else 0
    return f"{found.median:.{digits}f} ({found.low:.{digits}f}–{found.high:.{digits}f})"
