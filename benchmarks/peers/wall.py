"""The wall: how fast this machine reads memory, which bounds every decode. `python -m benchmarks.peers.wall` prints it.

Compiles wall.c for this processor and tries a few ways to read (parallel runs, prefetch distances); the fastest is the
wall, because an engine may read that way too.
"""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

WAYS = ((1, 0), (4, 0), (4, 512), (8, 512))
"""(interleaved runs per thread, bytes prefetched ahead)."""
SURVEYED = tuple(mib << 20 for mib in (1, 16, 64, 256, 1024, 2048))
READ_BYTES = 3_000_000_000  # of one measurement, about: long against the timer, short against the run


@dataclass(frozen=True, slots=True)
class Wall:
    """Median read bandwidth over one working set."""

    working_set_bytes: int
    threads: int
    gb_per_s: float
    streams: int
    ahead_bytes: int


def build(folder: Path) -> Path:
    """The compiled reader in `folder`. Raises subprocess.CalledProcessError when there is no working gcc."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "wall"
    source = Path(__file__).with_name("wall.c")
    command = ["gcc", "-O3", "-march=native", "-pthread", "-o", str(program), str(source)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return program


class Meter:
    """Measures the wall: `survey` finds the fastest way to read each working set, `now` reads it that way again."""

    def __init__(self, program: Path, threads: int) -> None:
        self._program, self._threads = program, threads
        self._ways: dict[tuple[int, int], tuple[int, int]] = {}

    def survey(self) -> Iterator[Wall]:
        """Working sets of 1 MiB to 2 GiB on one thread and on all."""
        for working_set_bytes in SURVEYED:
            for threads in sorted({1, self._threads}):
                yield self._best(working_set_bytes, threads)

    def now(self, working_set_bytes: int) -> float:
        """GB/s of the working set at this moment, on all threads; takes about a second."""
        key = (working_set_bytes, self._threads)
        if key not in self._ways:
            self._best(*key)
        return self._read(working_set_bytes, self._threads, *self._ways[key])

    def _best(self, working_set_bytes: int, threads: int) -> Wall:
        speeds = {way: self._read(working_set_bytes, threads, *way) for way in WAYS}
        way = max(speeds, key=lambda one: speeds[one])
        self._ways[working_set_bytes, threads] = way
        return Wall(working_set_bytes, threads, round(speeds[way], 2), *way)

    def _read(self, working_set_bytes: int, threads: int, streams: int, ahead: int) -> float:
        """Median over passes, after one pass of warming up."""
        passes = max(3, min(2000, READ_BYTES // working_set_bytes))
        command = [str(self._program), *map(str, (working_set_bytes, threads, passes + 1, streams, ahead))]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        return statistics.median(float(read) / float(took) / 1e9 for read, took in (line.split() for line in lines[1:]))


def main() -> None:
    for found in Meter(build(Path(".cache/wall")), 2).survey():
        print(json.dumps(asdict(found)), flush=True)


if __name__ == "__main__":
    main()
