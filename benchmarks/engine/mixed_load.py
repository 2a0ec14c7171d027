"""Streams that decode while long prompts arrive one after another: how much longer their tokens take to come.

The streams' own contexts grow meanwhile, which alone makes their steps longer. So they are watched in quiet before the
prompts and after them, for the same time, and the quiet figures are those of both together.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from benchmarks import random_models
from benchmarks.engine import tiny
from benchmarks.engine.streams import ask, gaps_ms, percentile, prompts, running
from benchmarks.harness import Bar
from benchmarks.peers.shapes import SHAPES
from engine.executors.native import NativeExecutor
from engine.precision.plan import PLANS
from engine.runtime.loop import Limits

STREAMS = 8
PROMPT = 64
WANTED = 2.0
DEFAULT = Limits().slowdown
SLOWDOWNS = (1.3, DEFAULT, 2.0)


def measure(executor: NativeExecutor, slowdown: float, quiet_s: float, arrivals: int, long: int) -> dict[str, Any]:
    """Inter-token times of `STREAMS` streams without and with `arrivals` prompts of `long` tokens."""
    room = executor.architecture.max_position_embeddings - PROMPT - 8
    with running(executor, Limits(slowdown=slowdown)) as loop:
        streams = [ask(loop, prompt, room) for prompt in prompts(executor, STREAMS, PROMPT)]
        while not all(len(stream.times) > 20 for stream in streams):  # the cost of a step is learnt meanwhile
            time.sleep(0.05)
        begin = time.perf_counter()
        time.sleep(quiet_s)
        middle = time.perf_counter()
        first_token_s = []
        for prompt in prompts(executor, arrivals, long, seed=1):
            asked = time.perf_counter()
            stream = ask(loop, prompt, 1)
            stream.wait()
            first_token_s.append(time.perf_counter() - asked)
        end = time.perf_counter()
        time.sleep(quiet_s)
        after = time.perf_counter()
        before_ms, after_ms = gaps_ms(streams, begin, middle), gaps_ms(streams, end, after)
        quiet, busy = before_ms + after_ms, gaps_ms(streams, middle, end)
        for running_one in list(loop._running):
            loop.cancel(running_one)
        for stream in streams:
            stream.wait()
    return {
        "slowdown": slowdown,
        "quiet_ms": {"p50": percentile(quiet, 0.5), "p99": percentile(quiet, 0.99), "tokens": len(quiet)},
        "quiet_before_p99_ms": percentile(before_ms, 0.99),
        "quiet_after_p99_ms": percentile(after_ms, 0.99),
        "busy_ms": {
            "p50": percentile(busy, 0.5),
            "p99": percentile(busy, 0.99),
            "max": max(busy),
            "tokens": len(busy),
        },
        "p99_ratio": percentile(busy, 0.99) / percentile(quiet, 0.99),
        "first_token_s": first_token_s,
    }


def drill(quick: bool) -> tuple[list[Bar], dict[str, Any]]:
    """q05 in int8 with cold weights, and glm-tiny, whose weights stay in the cache."""
    bars: list[Bar] = []
    details: dict[str, Any] = {}
    makes: dict[str, tuple[Callable[[], NativeExecutor], float, int, int]] = {
        "q05 int8": (lambda: random_models.executor(SHAPES["q05"], PLANS["int8"], 2, context=8192), 5.0, 2, 2048),
        "glm-tiny int8": (lambda: tiny.executor("int8"), 1.0, 3, 1900),
    }
    for name, (make, quiet_s, arrivals, long) in makes.items():
        executor, runs = make(), []
        for slowdown in (DEFAULT,) if quick else SLOWDOWNS:
            runs.append(measure(executor, slowdown, quiet_s, 1 if quick else arrivals, long))
            quiet, busy = runs[-1]["quiet_ms"], runs[-1]["busy_ms"]
            print(
                f"  {name} slowdown {slowdown}: quiet {quiet['p50']:.1f}/{quiet['p99']:.1f} ms, busy "
                f"{busy['p50']:.1f}/{busy['p99']:.1f} ms (p50/p99), prompt after {runs[-1]['first_token_s']}",
                flush=True,
            )
        ratio = next(run["p99_ratio"] for run in runs if run["slowdown"] == DEFAULT)
        bars.append(Bar(f"mixed load {name}: p99 / quiet p99", f"{ratio:.2f}x", f"<= {WANTED:g}x", ratio <= WANTED))
        details[name] = runs
    return bars, details
