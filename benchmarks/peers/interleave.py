"""Measures contestants side by side: blocks in which each runs once, in an order drawn from the seed.

A block whose steal time (work of other guests on this machine's processors, /proc/stat) is above the limit is thrown
away and done again, a bounded number of times. Ratios are taken within a block, so drift of the machine cancels.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers.child import Child, Failed

STAT = Path("/proc/stat")


@dataclass(frozen=True, slots=True)
class Work:
    """One kind of work; its figure is tokens per second over all sequences."""

    name: str
    op: str
    batch: int = 1
    prompt: int = 128
    new: int = 64
    tokens: int = 0
    for_bars: bool = True
    """False: a point of the batch curve, for our engine and llama.cpp only."""
    tuned_as: str = ""
    """Name of an earlier work whose options this one takes; empty: its own are tuned."""

    def request(self) -> dict[str, Any]:
        if self.op == "decode":
            return {"op": "decode", "prompt": self.prompt, "new": self.new, "batch": self.batch}
        return {"op": "prefill", "tokens": self.tokens}

    def figure(self, answer: dict[str, Any]) -> float:
        """Tokens per second of one measurement; of a decode by the median step."""
        if self.op == "decode":
            return self.batch / statistics.median(answer["step_s"])
        return self.tokens / float(answer["took_s"])


@dataclass(slots=True)
class Block:
    """One measurement of each contestant, close in time; a contestant that failed is missing."""

    work: str
    steal_share: float
    figures: dict[str, float] = field(default_factory=dict)
    wall_gb_per_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Entrant:
    """A contestant with its loaded process and the options tuned for each work."""

    name: str
    child: Child
    options: dict[str, dict[str, Any]]


def tune(
    child: Child, works: list[Work], candidates: dict[str, tuple[dict[str, Any], ...]], repeats: int
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """The best candidate of each work and the log of all that was tried. Raises Failed."""
    best: dict[str, dict[str, Any]] = {}
    log: list[dict[str, Any]] = []
    for work in works:
        choices = candidates.get(work.op, ({},))
        if work.tuned_as in best:
            best[work.name] = best[work.tuned_as]
            continue
        tried: list[tuple[float, dict[str, Any]]] = []
        for options in choices if len(choices) > 1 else ():
            answers = [child.ask(**_short(work).request(), options=options) for _ in range(repeats)]
            tried.append((max(work.figure(answer) for answer in answers), options))
            log.append({"work": work.name, "options": options, "tokens_per_s": round(tried[-1][0], 2)})
        best[work.name] = max(tried, key=lambda pair: pair[0])[1] if tried else choices[0]
    return best, log


def measure(
    entrants: list[Entrant],
    work: Work,
    rounds: int,
    seed: int,
    steal_limit: float,
    wall: Callable[[], float],
    failures: dict[str, str],
) -> tuple[list[Block], list[Block]]:
    """`rounds` good blocks of one work and those thrown away (at most as many again); who fails leaves and is noted."""
    order = random.Random(f"{seed} {work.name}")
    good: list[Block] = []
    bad: list[Block] = []
    running = list(entrants)
    while running and len(good) < rounds and len(bad) < rounds:
        order.shuffle(running)
        before, block = _processor_time(), Block(work.name, 0.0)
        block.wall_gb_per_s = wall()
        for entrant in list(running):
            try:
                answer = entrant.child.ask(**work.request(), options=entrant.options.get(work.name, {}))
                block.figures[entrant.name] = work.figure(answer)
            except Failed as error:
                failures[f"{entrant.name}, {work.name}"] = str(error)
                running.remove(entrant)
        block.steal_share = _steal_share(before, _processor_time())
        (good if block.steal_share <= steal_limit else bad).append(block)
    return good, bad


def _short(work: Work) -> Work:
    """Enough of the work to choose options by."""
    return Work(work.name, work.op, work.batch, work.prompt, min(work.new, 16), work.tokens)


def _processor_time() -> list[int]:
    if not STAT.exists():
        return []
    return [int(value) for value in STAT.read_text().splitlines()[0].split()[1:]]


def _steal_share(before: list[int], after: list[int]) -> float:
    """Share of stolen time between two readings: the eighth field of /proc/stat; 0 where there is no such file."""
    if len(before) < 8 or len(after) < 8:
        return 0.0
    total = sum(after[:8]) - sum(before[:8])
    return (after[7] - before[7]) / total if total > 0 else 0.0
