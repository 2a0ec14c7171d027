"""Memory of each service of the mesh, from start and under load: what `benchmarks.sizing` makes requests from.

    python -m benchmarks.footprint [--requests 200] [--concurrency 32]

Peak resident memory (VmHWM) of a process when it is ready, and after streamed generations of glm-tiny. Workers are
left out: their size is their model's and comes from `benchmarks.engine memory`. Not a matter of time, so a busy machine
gives the same figures.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import Any

from benchmarks.harness import Bar, Mesh, load, report, running

SERVICES = ("gateway", "tokenizer", "scheduler", "cache")


def peaks(mesh: Mesh) -> dict[str, int]:
    """Bytes by service."""
    return {name: max(_peak(process.pid) for process in mesh.processes(name)) for name in SERVICES}


def _peak(pid: int | None) -> int:
    """The process and its children: a template's helper is the tokenizer's."""
    family = [pid, *_children(pid)]
    return sum(_status(member, "VmHWM") for member in family)


def _children(pid: int | None) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def _status(pid: int | None, name: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


async def measure(mesh: Mesh, requests: int, concurrency: int) -> dict[str, Any]:
    """Peaks before and after the load."""
    ready = peaks(mesh)
    done = await load(mesh, requests, concurrency, max_tokens=64)
    return {
        "requests": requests,
        "concurrency": concurrency,
        "failures": done.failures,
        "tokens": done.tokens,
        "ready_bytes": ready,
        "peak_bytes": peaks(mesh),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--concurrency", type=int, default=32)
    given = parser.parse_args()
    with running() as mesh:
        found = asyncio.run(measure(mesh, given.requests, given.concurrency))
    bars = [Bar("footprint: failed requests", str(found["failures"]), "0", found["failures"] == 0)]
    for name, size in found["peak_bytes"].items():
        grown = size - found["ready_bytes"][name]
        bars.append(
            Bar(f"footprint {name}: peak", f"{size / 1e6:.0f} MB, {grown / 1e6:.0f} of it under load", "-", True)
        )
    command = f"python -m benchmarks.footprint --requests {given.requests} --concurrency {given.concurrency}"
    report("footprint", bars, found, command)


if __name__ == "__main__":
    main()
