"""Two workers under load; then the scheduler dies, then a worker: who notices what."""

from __future__ import annotations

import asyncio
from typing import Any

from benchmarks.harness import Bar, Load, Mesh, load

TYPED = {"InterruptedStreamError", "UnavailableError"}


async def split(mesh: Mesh, requests: int, concurrency: int) -> tuple[Load, dict[str, int]]:
    """A load over all workers, and how many generations each finished."""
    before = {worker.name: _finished(mesh, worker.name) for worker in mesh.processes("sparse-inference")}
    result = await load(mesh, requests, concurrency)
    return result, {name: _finished(mesh, name) - count for name, count in before.items()}


async def scheduler_killed(mesh: Mesh, requests: int, concurrency: int) -> tuple[Load, int, int]:
    """kill -9 the scheduler a quarter into the load; (load, requests nobody picked, Envoy's fail-open count)."""
    workers = mesh.processes("sparse-inference")
    unpicked = sum(_unpicked(mesh, worker.name) for worker in workers)
    allowed = mesh.envoy_stat("failure_mode_allowed")
    victim = mesh.processes("scheduler")[0]

    def strike(ended: int) -> None:
        if ended == requests // 4:
            mesh.kill(victim)

    result = await load(mesh, requests, concurrency, on_done=strike)
    after = sum(_unpicked(mesh, worker.name) for worker in workers)
    fallbacks = mesh.envoy_stat("failure_mode_allowed") - allowed
    await mesh.until(lambda: _is_back(mesh, victim.name, victim.pid), "the scheduler is back")
    return result, after - unpicked, fallbacks


async def worker_killed(mesh: Mesh, requests: int, concurrency: int) -> tuple[Load, Load]:
    """kill -9 one worker a quarter into the load; (that load, a load after it)."""
    victim = mesh.processes("sparse-inference")[0]

    def strike(ended: int) -> None:
        if ended == requests // 4:
            mesh.kill(victim)

    async with asyncio.timeout(120):
        during = await load(mesh, requests, concurrency, max_tokens=48, on_done=strike)
    after = await load(mesh, max(20, requests // 4), concurrency)
    await mesh.until(lambda: _is_back(mesh, victim.name, victim.pid), "the worker is back")
    return during, after


async def drill(mesh: Mesh, requests: int = 200, concurrency: int = 8) -> tuple[list[Bar], dict[str, Any]]:
    """All three, in order."""
    steady, shares = await split(mesh, requests, concurrency)
    headless, unpicked, allowed = await scheduler_killed(mesh, requests, concurrency)
    during, after = await worker_killed(mesh, requests, concurrency)
    broken = sum(during.outcomes[kind] for kind in TYPED)
    bars = [
        Bar("two workers: failed requests", f"{steady.failures}/{requests}", "0", steady.failures == 0),
        Bar("two workers: split", str(shares), "both used", min(shares.values()) > requests // 10),
        Bar("scheduler killed: failed requests", f"{headless.failures}/{requests}", "0", headless.failures == 0),
        Bar("scheduler killed: fallbacks counted", f"{unpicked} by workers, {allowed} by Envoy", ">0", unpicked > 0),
        Bar(
            "worker killed: streams that ended in a typed error",
            f"{broken} of {during.failures} failed",
            "all that failed; at most the concurrency",
            broken == during.failures <= concurrency,
        ),
        Bar("worker killed: next requests failed", str(after.failures), "0", after.failures == 0),
    ]
    details = {
        "requests": requests,
        "concurrency": concurrency,
        "steady": {"outcomes": dict(steady.outcomes), "took_s": steady.took_s, "tokens": steady.tokens},
        "scheduler_killed": {"outcomes": dict(headless.outcomes), "took_s": headless.took_s},
        "worker_killed": {"outcomes": dict(during.outcomes), "took_s": during.took_s, "errors": during.errors},
        "after": dict(after.outcomes),
    }
    return bars, details


def _process(mesh: Mesh, name: str) -> Any:
    return next(process for process in mesh.state.processes if process.name == name)


def _finished(mesh: Mesh, name: str) -> int:
    return int(mesh.metric(_process(mesh, name), "autoglm_generations_total"))


def _unpicked(mesh: Mesh, name: str) -> int:
    return int(mesh.metric(_process(mesh, name), "autoglm_fallback_total", kind="no_endpoint_picked"))


def _is_back(mesh: Mesh, name: str, old_pid: int | None) -> bool:
    process = _process(mesh, name)
    return process.phase == "ready" and process.pid != old_pid
