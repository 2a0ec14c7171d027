"""From blocks to figures: medians, quartiles, ratios within blocks with a bootstrap interval, and the bars."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.peers.contestants import Contestant
from benchmarks.peers.interleave import Block

RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Bar:
    """One claim: what was measured and what was wanted."""

    name: str
    value: str
    target: str
    is_met: bool


@dataclass(frozen=True, slots=True)
class Spread:
    """Median with quartiles."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Ratio:
    """Median over blocks of A / B with its bootstrap 95 % interval."""

    median: float
    low: float
    high: float
    blocks: int


def spread(values: Sequence[float]) -> Spread:
    """Quartiles of at least one value."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def ratio(blocks: Sequence[Block], ours: str, theirs: str) -> Ratio | None:
    """None when no block has both."""
    pairs = [b.figures[ours] / b.figures[theirs] for b in blocks if ours in b.figures and theirs in b.figures]
    if not pairs:
        return None
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(pairs, k=len(pairs))) for _ in range(RESAMPLES))
    low, high = medians[int(0.025 * RESAMPLES)], medians[int(0.975 * RESAMPLES) - 1]
    return Ratio(statistics.median(pairs), low, high, len(pairs))


def figures(blocks: Sequence[Block]) -> dict[str, Spread]:
    """Tokens per second of each contestant over the blocks of one work."""
    names = sorted({name for block in blocks for name in block.figures})
    return {name: spread([b.figures[name] for b in blocks if name in b.figures]) for name in names}


def wall_shares(blocks: Sequence[Block], batch: int, model_bytes: dict[str, int]) -> dict[str, tuple[float, float]]:
    """GB/s that decoding read and its share of the wall measured in the same block, median, by contestant.

    A step reads each weight once, whatever the batch; caches of keys and values are not counted.
    """
    shares: dict[str, tuple[float, float]] = {}
    for name, size in model_bytes.items():
        speeds = [(b.figures[name] / batch * size / 1e9, b.wall_gb_per_s) for b in blocks if name in b.figures]
        if speeds and all(wall > 0 for _, wall in speeds):
            shares[name] = (
                statistics.median(speed for speed, _ in speeds),
                statistics.median(speed / wall for speed, wall in speeds),
            )
    return shares


def best(names: Sequence[str], measured: dict[str, Spread]) -> str | None:
    """Who of `names` has the highest median; None when nobody was measured."""
    there = [name for name in names if name in measured]
    return max(there, key=lambda name: measured[name].median) if there else None


PAIRS: dict[str, tuple[tuple[str, str, float], ...]] = {
    "q05": (
        ("ours int8", "llama.cpp Q8_0", 1.3),
        ("ours int4", "llama.cpp Q4_0", 1.5),
        ("ours int4-head4", "llama.cpp Q4_0", 1.5),
    ),
    "g15": (
        ("ours int8", "llama.cpp Q8_0", 1.08),
        ("ours int4", "llama.cpp Q4_0", 1.2),
        ("ours int4-head4", "llama.cpp Q4_0", 1.2),
    ),
    "s14": (
        ("ours int8 skipping", "ours int8", 1.5),
        ("ours int8 skipping", "llama.cpp Q8_0", 1.6),
        ("ours int4 skipping", "ours int4", 1.4),
        ("ours int4 skipping", "llama.cpp Q4_0", 1.8),
        ("ours int4-head4 skipping", "ours int4-head4", 1.4),
        ("ours int4-head4 skipping", "llama.cpp Q4_0", 1.8),
    ),
}
"""Decode at batch 1: (ours, theirs, wanted ratio) by shape; a 4-bit bar is told with both kinds of head."""
WALLS = {
    "q05": {"ours int8": 0.90, "ours int4": 0.80, "ours int4-head4": 0.80},
    "g15": {"ours int8": 0.93, "ours int4": 0.90, "ours int4-head4": 0.90},
}
"""Decode at batch 1: wanted share of the wall."""
AGAINST_BEST = {
    "q05": {"decode batch 8": 2.0, "prefill 512": 2.5, "prefill 2048": 2.5},
    "g15": {"decode batch 8": 2.0, "prefill 512": 2.0, "prefill 2048": 2.0},
}
"""Wanted ratio of our best weights to the best peer with any weights."""


def bars(
    shape: str, blocks: dict[str, list[Block]], taking_part: Sequence[Contestant], model_bytes: dict[str, int]
) -> list[Bar]:
    """Every bar of one shape whose work was asked for (is a key of `blocks`).

    Without our figure or the peer's such a bar is missed and says `not measured`.
    """
    result = []
    single = blocks.get("decode batch 1", [])
    is_single = "decode batch 1" in blocks
    for ours, theirs, wanted in PAIRS.get(shape, ()) if is_single else ():
        result.append(_bar(f"{shape} decode: {ours} / {theirs}", ratio(single, ours, theirs), wanted))
    shares = wall_shares(single, 1, model_bytes)
    for name, share in WALLS.get(shape, {}).items() if is_single else ():
        value = f"{100 * shares[name][1]:.0f} %" if name in shares else "not measured"
        is_met = name in shares and shares[name][1] >= share
        result.append(Bar(f"{shape} decode: {name}, share of the wall", value, f">= {100 * share:.0f} %", is_met))
    peers = [c.name for c in taking_part if not c.is_ours and not c.informational]
    mine = [c.name for c in taking_part if c.is_ours and not c.informational]
    for work, wanted in AGAINST_BEST.get(shape, {}).items():
        if work not in blocks:
            continue
        measured = figures(blocks[work])
        us, them = best(mine, measured), best(peers, measured)
        found = ratio(blocks[work], us, them) if us and them else None
        result.append(_bar(f"{shape} {work}: {us or 'ours'} / best peer ({them or 'none'})", found, wanted))
    return result


def record(blocks: dict[str, list[Block]]) -> dict[str, Any]:
    """The blocks for the result file."""
    return {
        work: [
            {
                "steal_share": round(block.steal_share, 5),
                "wall_gb_per_s": round(block.wall_gb_per_s, 2),
                "tokens_per_s": {name: round(value, 2) for name, value in sorted(block.figures.items())},
            }
            for block in those
        ]
        for work, those in blocks.items()
    }


def _bar(name: str, found: Ratio | None, wanted: float) -> Bar:
    if found is None:
        return Bar(name, "not measured", f">= {wanted:g}x", False)
    value = f"{found.median:.2f}x ({found.low:.2f} to {found.high:.2f}, {found.blocks} blocks)"
    return Bar(name, value, f">= {wanted:g}x", found.median >= wanted)
