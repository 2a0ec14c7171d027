"""Time to the first token with a shared prefix of about 1,000 tokens: cold, warm in the worker, warm from the cache."""

from __future__ import annotations

import statistics
import time
from typing import Any

import autoglm

from benchmarks.harness import MODEL, Bar, Mesh, client


async def prompt_of(caller: autoglm.AsyncClient, number: int, tokens: int) -> str:
    """Text of about `tokens` tokens that no other number shares."""
    lines: list[str] = [f"# shared prefix {number}"]
    while True:
        lines += [f"value_{number}_{len(lines) + step} = {number * 7919 + len(lines) * 31 + step}" for step in range(8)]
        text = "\n".join(lines) + "\n"
        if (await caller.count_tokens(text, model=MODEL)).tokens >= tokens:
            return text


async def first_token(caller: autoglm.AsyncClient, prompt: str) -> tuple[float, int, int]:
    """(milliseconds to the first text, prompt tokens, cached tokens)."""
    began, first = time.perf_counter(), 0.0
    usage = None
    stream = caller.stream(prompt, model=MODEL, max_tokens=4, temperature=0, ignore_eos=True, timeout=120)
    async with stream as events:
        async for event in events:
            if isinstance(event, autoglm.Delta) and not first:
                first = (time.perf_counter() - began) * 1000
            if isinstance(event, autoglm.Done):
                usage = event.usage
    assert usage is not None
    return first, usage.prompt_tokens, usage.cached_tokens


async def drill(mesh: Mesh, rounds: int = 8, tokens: int = 1000) -> tuple[list[Bar], dict[str, Any]]:
    """Rounds of cold and warm, interleaved; then all workers are killed, so that only the cache service remembers."""
    cold: list[float] = []
    warm: list[float] = []
    cached: list[int] = []
    async with client(mesh) as caller:
        prompts = [await prompt_of(caller, number, tokens) for number in range(rounds)]
        for number, prompt in enumerate(prompts):
            ms, _, hit = await first_token(caller, prompt + f"# cold {number}\n")
            assert hit == 0, "the first use of a prefix is cold"
            cold.append(ms)
            ms, _, hit = await first_token(caller, prompt + f"# warm {number}\n")
            warm.append(ms)
            cached.append(hit)
        stored = sum(int(mesh.metric(w, "autoglm_published_blocks_total")) for w in mesh.processes("sparse-inference"))
        victims = mesh.processes("sparse-inference")
        for victim in victims:
            mesh.kill(victim)
        await mesh.until(lambda: _all_new(mesh, {victim.pid for victim in victims}), "the workers are back", 60)
        fetched_ms: list[float] = []
        fetched: list[int] = []
        for number, prompt in enumerate(prompts):
            ms, _, hit = await first_token(caller, prompt + f"# fetched {number}\n")
            fetched_ms.append(ms)
            fetched.append(hit)
    ratio = statistics.median(cold) / statistics.median(warm)
    least = tokens - 16 - 8  # the last, incomplete block, and a suffix may join its first tokens to the prefix's last
    bars = [
        Bar("time to first token, cold", _spread(cold), "-", True),
        Bar("time to first token, warm in the worker", _spread(warm), "-", True),
        Bar("time to first token, warm from the cache service", _spread(fetched_ms), "-", True),
        Bar("cold ÷ warm (medians)", f"{ratio:.1f}×", ">1×", ratio > 1),
        Bar("cached tokens, warm in the worker", str(sorted(set(cached))), f"≥{least}", min(cached) >= least),
        Bar("cached tokens, from the cache service", str(sorted(set(fetched))), f"≥{least}", min(fetched) >= least),
    ]
    return bars, {"cold_ms": cold, "warm_ms": warm, "fetched_ms": fetched_ms, "cached": cached, "fetched": fetched,
                  "published_blocks": stored}  # fmt: skip


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.0f} ms ({min(values):.0f}…{max(values):.0f}, n={len(values)})"


def _all_new(mesh: Mesh, old: set[int | None]) -> bool:
    workers = mesh.processes("sparse-inference")
    return all(worker.phase == "ready" and worker.pid not in old for worker in workers)
