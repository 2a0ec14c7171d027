"""Eight callers of the engine's step loop in this process: who got which token when.

Shared by the engine's benchmarks. Times are taken in the listener, on the step thread.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from engine.executors.native import NativeExecutor
from engine.runtime.loop import Limits, Loop
from engine.runtime.sampling import Sampling
from engine.runtime.sequences import Event, Failure, Finished, Request, Tokens

PATIENCE_S = 600.0


@dataclass
class Stream:
    """What one request was told: the time and number of tokens of each event."""

    times: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    failure: Failure | None = None

    def hear(self, event: Event) -> None:
        if isinstance(event, Tokens):
            self.times.append(time.perf_counter())
            self.counts.append(len(event.token_ids))
            self.token_ids.extend(event.token_ids)
        else:
            self.failure = event if isinstance(event, Failure) else None
            self.ended.set()
        assert isinstance(event, Tokens | Finished | Failure)

    def wait(self) -> None:
        """Until the request ended. Raises RuntimeError when it failed or hangs."""
        if not self.ended.wait(PATIENCE_S) or self.failure not in (None, Failure.CANCELLED):
            raise RuntimeError(f"a request ended with {self.failure}")


@contextmanager
def running(executor: NativeExecutor, limits: Limits) -> Iterator[Loop]:
    """A started loop; closed and joined when the block ends."""
    loop = Loop(executor, limits)
    loop.start()
    try:
        yield loop
    finally:
        loop.close()
        loop.join(PATIENCE_S)


def ask(loop: Loop, prompt: Sequence[int], new: int, sampling: Sampling | None = None) -> Stream:
    """Submits one request that goes on past the model's ends."""
    stream = Stream()
    loop.submit(Request(prompt, new, Sampling(temperature=0.0) if sampling is None else sampling), stream.hear)
    return stream


def prompts(executor: NativeExecutor, count: int, tokens: int, seed: int = 0) -> list[list[int]]:
    """Random tokens; no two prompts share a block."""
    found: list[list[int]] = np.random.default_rng(seed).integers(8, executor.vocab_size, (count, tokens)).tolist()
    return found


def gaps_ms(streams: Sequence[Stream], begin: float, end: float) -> list[float]:
    """Times between a stream's events, of those that came between `begin` and `end`."""
    return [
        (later - earlier) * 1000
        for stream in streams
        for earlier, later in zip(stream.times, stream.times[1:], strict=False)
        if begin <= earlier and later <= end
    ]


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of `values` do not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def tokens_per_s(streams: Sequence[Stream]) -> float:
    """All streams together, while all of them were decoding."""
    begin, end = max(s.times[0] for s in streams), min(s.times[-1] for s in streams)
    made = sum(n for s in streams for at, n in zip(s.times, s.counts, strict=True) if begin < at <= end)
    return made / (end - begin)


def median_of(values: Sequence[float]) -> float:
    return statistics.median(values)
