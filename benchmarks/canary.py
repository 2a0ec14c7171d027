"""A canary's weight goes 0 → 10 → 50 → 100 by editing the YAML while requests and one long stream run."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import autoglm
from scipy.stats import binom

from benchmarks.harness import MODEL, Bar, Load, Mesh, client, load

STEPS = (0, 10, 50, 100)
REPLICAS = "sparse-inference/v1=1,sparse-inference/canary=1"


def with_weight(text: str, canary: int) -> str:
    """The routes file with `canary` percent for the canary subset."""
    changed = re.sub(r"(subset: v1\b.*?weight: )\d+", rf"\g<1>{100 - canary}", text, count=1, flags=re.DOTALL)
    return re.sub(r"(subset: canary\b.*?weight: )\d+", rf"\g<1>{canary}", changed, count=1, flags=re.DOTALL)


async def set_weight(mesh: Mesh, canary: int) -> float:
    """Edits the weight; seconds until the new policy is in force."""
    version = mesh.state.policy.version
    current = mesh.policy.joinpath("routes.yaml").read_text()
    wanted = with_weight(current, canary)
    if wanted == current:
        return 0.0
    mesh.edit("routes.yaml", lambda _: wanted)
    return await mesh.until(lambda: mesh.state.policy.version != version, f"weight {canary} is in force", 10)


async def long_stream(mesh: Mesh, begun: asyncio.Event, stop: asyncio.Event) -> tuple[int, str]:
    """A stream that runs until `stop` is set; (events seen, error text or nothing)."""
    seen = 0
    try:
        async with client(mesh) as caller:
            while not stop.is_set():
                stream = caller.stream("# a long one\n", model=MODEL, max_tokens=1500, ignore_eos=True, timeout=300)
                async with stream as events:
                    async for event in events:
                        seen += isinstance(event, autoglm.Delta)
                        begun.set()
                        if stop.is_set():
                            break
    except autoglm.AutoglmError as error:
        return seen, f"{type(error).__name__}: {error}"
    return seen, ""


async def drill(mesh: Mesh, requests: int = 200, concurrency: int = 8) -> tuple[list[Bar], dict[str, Any]]:
    """Each step: edit, wait until it is in force, measure the split over `requests`."""
    begun, stop = asyncio.Event(), asyncio.Event()
    watcher = asyncio.create_task(long_stream(mesh, begun, stop))
    await asyncio.wait_for(begun.wait(), 30)
    bars: list[Bar] = []
    steps: list[dict[str, Any]] = []
    for weight in STEPS:
        # The edit happens under load: half the step's requests are on their way while it lands.
        crossing = asyncio.create_task(load(mesh, requests // 2, concurrency // 2))
        applied_s = await set_weight(mesh, weight)
        over_edit: Load = await crossing
        before = _counts(mesh)
        result = await load(mesh, requests, concurrency)
        after = _counts(mesh)
        canary, total = after["canary"] - before["canary"], sum(after.values()) - sum(before.values())
        low, high = (
            map(int, binom.interval(0.99, total, weight / 100)) if 0 < weight < 100 else (weight // 100 * total,) * 2
        )
        failed = result.failures + over_edit.failures
        bars += [
            Bar(f"weight {weight}: canary's share", f"{canary}/{total}", f"{low:g}…{high:g}", low <= canary <= high),
            Bar(f"weight {weight}: failed requests", str(failed), "0", failed == 0),
            Bar(f"weight {weight}: in force after", f"{applied_s:.2f} s", "≤1 s", applied_s <= 1.0),
        ]
        steps.append({"weight": weight, "canary": canary, "total": total, "failed": failed, "applied_s": applied_s})
    stop.set()
    seen, error = await watcher
    bars.append(Bar("the long stream", f"{seen} events, {error or 'no error'}", "no error", not error))
    return bars, {"steps": steps, "requests": requests, "concurrency": concurrency}


def _counts(mesh: Mesh) -> dict[str, int]:
    """Generations begun, by version label."""
    counts = {"v1": 0, "canary": 0}
    for worker in mesh.processes("sparse-inference"):
        counts[worker.labels["version"]] += int(mesh.metric(worker, "autoglm_routed_requests_total"))
    return counts
