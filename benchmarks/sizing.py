"""What a pod has to ask for, from what was measured: CPU by roofline and CPU time per token, memory by bytes.

    python -m benchmarks.sizing                       # glm-tiny, as in deploy/kubernetes/base
    python -m benchmarks.sizing --model DIR --precision int4 --threads 4 --tokens-per-s 120

Prints each request with its arithmetic. It reads benchmarks/results only; a contract test holds the manifests to it.
Its figures are of the machine that made the results: measure where the pods will run, then print again.
"""

from __future__ import annotations

import argparse
import json
import math
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import REPOSITORY, RESULTS
from engine.checkpoints.opening import open_checkpoint
from engine.checkpoints.packed import layout_of
from engine.precision.plan import plan_for

MIB = 1 << 20
ROOM = 1.25
"""On measured memory: allocators keep more under another load than the one measured."""
STEP_MIB = 16
CPU_STEP_M = 10
MOST_AT_ONCE = 256
"""Requests at work in one gateway, by its own bound; no other service has more."""
PLAIN = ("gateway", "tokenizer", "scheduler", "cache")


@dataclass(frozen=True, slots=True)
class Request:
    """What one pod asks for, and why."""

    cpu_m: int
    memory_mib: int
    limit_mib: int
    """Where the kernel ends the process: twice the request, or what MOST_AT_ONCE requests would need, if more."""
    because: str


def packed_bytes(model: Path, precision: str) -> int:
    """Size of the model's weights as a worker holds them."""
    with closing(open_checkpoint(model)) as checkpoint:
        arch = checkpoint.architecture
    return max(entry.end for entry in layout_of(arch, plan_for(precision, arch, True)))


def worker(packed: int, threads: int, kv_mib: int) -> Request:
    """A worker: a CPU per engine thread, and bytes of weights, keys and values, and the process itself."""
    memory = _result("engine")["parts"]["memory"]["q05 int8"]
    process = memory["peak_bytes"] - memory["packed_bytes"] - memory["kv_bytes"]
    wanted = packed + kv_mib * MIB + process * ROOM
    gb_per_s = bandwidth(packed, threads)
    because = (
        f"{threads} CPU read {gb_per_s:g} GB/s, at most {gb_per_s * 1e9 / packed:.0f} tokens/s of one stream from "
        f"{packed / 1e6:.1f} MB packed; memory {packed / MIB:.0f} MiB packed + {kv_mib} MiB keys and values + "
        f"{process / MIB:.0f} MiB process x {ROOM}"
    )
    return Request(threads * 1000, _stepped(wanted), 2 * _stepped(wanted), because)


def bandwidth(working_set: int, threads: int) -> float:
    """Measured GB/s of the smallest working set that holds these bytes, or of the largest measured."""
    wall = _result("peers-q05")["wall"]
    most = max(row["threads"] for row in wall)
    rows = sorted((row["working_set_bytes"], row["gb_per_s"]) for row in wall if row["threads"] == min(threads, most))
    return float(next((speed for size, speed in rows if size >= working_set), rows[-1][1]))


def plain(service: str, tokens_per_s: float, extra_mib: int = 0) -> Request:
    """A service of plain Python: its CPU time per token at this rate, its measured peak, what its settings add."""
    spent = _result("engine")["parts"]["mesh"]["glm-tiny"]["cpu_us_per_token"][service]
    measured = _result("footprint")
    ready, peak = measured["ready_bytes"][service], measured["peak_bytes"][service]
    full = ready + (peak - ready) / measured["concurrency"] * MOST_AT_ONCE
    cpu_m = max(CPU_STEP_M, math.ceil(spent * tokens_per_s / 1000 / CPU_STEP_M) * CPU_STEP_M)
    because = (
        f"{spent} us of CPU per token x {tokens_per_s:.0f} tokens/s; memory {peak / MIB:.0f} MiB measured x {ROOM}"
        + (f" + {extra_mib} MiB by its settings" if extra_mib else "")
    )
    memory = _stepped(peak * ROOM + extra_mib * MIB)
    return Request(cpu_m, memory, max(2 * memory, _stepped(full * ROOM + extra_mib * MIB)), because)


def measured_rate() -> float:
    """Tokens per second that one mesh delivered on the machine of the results."""
    rates = _result("engine")["parts"]["mesh"]["glm-tiny"]["mesh_tokens_per_s"]
    return float(sum(rates) / len(rates))


def _stepped(size: float) -> int:
    return math.ceil(size / MIB / STEP_MIB) * STEP_MIB


def _result(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=REPOSITORY / "models" / "glm-tiny")
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kv-mib", type=int, default=128)
    parser.add_argument("--cache-mib", type=int, default=256)
    parser.add_argument("--tokens-per-s", type=float, default=0.0, help="of the whole mesh; default: as measured")
    given = parser.parse_args()
    rate = given.tokens_per_s or measured_rate()
    found = {"sparse-inference": worker(packed_bytes(given.model, given.precision), given.threads, given.kv_mib)}
    found |= {name: plain(name, rate, given.cache_mib if name == "cache" else 0) for name in PLAIN}
    for name, request in found.items():
        print(f"{name}: requests: {{cpu: {request.cpu_m}m, memory: {request.memory_mib}Mi}}")
        print(f"  limits: {{memory: {request.limit_mib}Mi}}\n  # {request.because}")


if __name__ == "__main__":
    main()
