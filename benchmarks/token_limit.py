"""`python -m benchmarks.token_limit`: ten times a token budget is offered, once it is granted.

A private mesh with one file of budgets. Tenants are told apart at the ingress by a header that the policy turns into
the tenant's name (a stand-in for the claim of a token, on the same road from there on). First the moderate tenants run
by themselves, then the greedy one beside them: open loop, never waiting when told to. What it was granted within the
window is what the gateway settled, and the change of what it holds for requests under way. Over the whole run, what it
settled is compared with what the answers said they had used, and with burst + rate × time.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import autoglm

from benchmarks.harness import MODEL, Bar, Mesh, report, running
from services.mesh import ports
from services.mesh.clouds import shared_cache

GREEDY, MODERATE = "greedy", ("moderate-a", "moderate-b")
BUDGET_PER_MINUTE, BURST = 2400, 240
TIMES = 10
MODERATE_PER_S = 0.7
MAX_TOKENS = 32
USED_PER_REQUEST = 30
"""Less than measured, so that more than TIMES the budget is offered: prompt and answer, every second one cut short."""

TOLERANCE = 0.05
KEY = "x-tenant-key"

BOOK = f"""version = 1
[tenants.{GREEDY}]
tokens_per_minute = {BUDGET_PER_MINUTE}
burst_tokens = {BURST}
""" + "".join(f"[tenants.{name}]\ntokens_per_minute = 60_000\n" for name in MODERATE)


@dataclass
class Seen:
    """What became of one tenant's requests."""

    outcomes: Counter[str] = field(default_factory=Counter)
    took_ms: list[float] = field(default_factory=list)
    first_ms: list[float] = field(default_factory=list)
    refused_ms: list[float] = field(default_factory=list)
    used: int = 0
    untold: int = 0
    """Refusals that did not say when to come back."""
    errors: list[str] = field(default_factory=list)

    @property
    def failures(self) -> int:
        return sum(count for outcome, count in self.outcomes.items() if outcome not in ("ok", "over budget"))

    def facts(self) -> dict[str, Any]:
        return {
            "outcomes": dict(self.outcomes),
            "used_tokens": self.used,
            "p50_ms": _median(self.took_ms),
            "first_token_p50_ms": _median(self.first_ms),
            "refusal_p50_ms": _median(self.refused_ms),
            "errors": self.errors[:5],
        }


def with_tenants(text: str) -> str:
    """The routes with one more for each tenant, in front of the others."""
    routes = "".join(
        f"""    - name: tenant-{name}
      match:
        - uri: {{prefix: /autoglm.gateway.v1.GatewayService/}}
          headers: {{{KEY}: {{exact: {name}}}}}
      headers: {{request: {{set: {{x-autoglm-tenant: {name}}}}}}}
      route:
        - destination: {{host: gateway, port: {{number: 50051}}}}
"""
        for name in (GREEDY, *MODERATE)
    )
    return text.replace("  http:\n", f"  http:\n{routes}", 1)


async def one(client: autoglm.AsyncClient, tenant: str, number: int, seen: Seen) -> None:
    """One request; every second one stops early, so that much of what it reserved goes back."""
    began, first = time.monotonic(), None
    prompt = f"# {tenant} {number}\ndef function_{number}(value):\n"
    stop = ("\n",) if number % 2 else ()
    try:
        stream = client.stream(
            prompt, model=MODEL, max_tokens=MAX_TOKENS, temperature=0.8, seed=number, stop=stop,
            ignore_eos=True, timeout=60, metadata={KEY: tenant},
        )  # fmt: skip
        async with stream as events:
            async for event in events:
                if isinstance(event, autoglm.Delta) and first is None:
                    first = time.monotonic() - began
                    seen.first_ms.append(first * 1000)
                if isinstance(event, autoglm.Done) and event.usage is not None:
                    seen.used += event.usage.prompt_tokens + event.usage.completion_tokens
        seen.outcomes["ok"] += 1
        seen.took_ms.append((time.monotonic() - began) * 1000)
    except autoglm.TooBusyError as error:
        is_budget = "tokens per minute" in error.message
        seen.outcomes["over budget" if is_budget else "too busy"] += 1
        seen.untold += error.retry_after_s is None
        seen.refused_ms.append((time.monotonic() - began) * 1000)
    except autoglm.AutoglmError as error:
        seen.outcomes[type(error).__name__] += 1
        seen.errors.append(f"{tenant} {number}: {type(error).__name__}: {error}"[:300])


async def offer(client: autoglm.AsyncClient, tenant: str, per_s: float, until: asyncio.Event, seen: Seen) -> None:
    """Requests at a steady rate whatever becomes of them, until told to stop; then waits for those under way."""
    began, number = time.monotonic(), 0
    async with asyncio.TaskGroup() as group:
        while not until.is_set():
            group.create_task(one(client, tenant, number, seen))
            number += 1
            wait_s = began + number / per_s - time.monotonic()
            if wait_s > 0:
                try:
                    await asyncio.wait_for(until.wait(), wait_s)
                except TimeoutError:
                    continue


async def moderates(mesh: Mesh, until: asyncio.Event) -> dict[str, Seen]:
    seen = {name: Seen() for name in MODERATE}
    async with autoglm.AsyncClient(mesh.ingress) as client, asyncio.TaskGroup() as group:
        for name in MODERATE:
            group.create_task(offer(client, name, MODERATE_PER_S, until, seen[name]))
    return seen


async def window(mesh: Mesh, seconds: float) -> tuple[float, float]:
    """(tokens the greedy tenant was granted, seconds it took): what was settled, and how what is held changed."""
    gateway = mesh.processes("gateway")[0]

    def reading() -> tuple[float, float]:
        while True:  # until nothing was settled between the two
            settled = mesh.metric(gateway, "autoglm_budget_settled_tokens_total", tenant=GREEDY)
            held, now = mesh.metric(gateway, "autoglm_budget_held_tokens", tenant=GREEDY), time.monotonic()
            if mesh.metric(gateway, "autoglm_budget_settled_tokens_total", tenant=GREEDY) == settled:
                return settled + held, now

    before, began = await asyncio.to_thread(reading)
    await asyncio.sleep(seconds)
    after, ended = await asyncio.to_thread(reading)
    return after - before, ended - began


async def drill(mesh: Mesh, seconds: float) -> tuple[list[Bar], dict[str, Any]]:
    """The moderate tenants alone, then with the greedy one."""
    version = mesh.state.policy.version
    mesh.edit("routes.yaml", with_tenants)
    await mesh.until(lambda: mesh.state.policy.version != version, "the tenants' routes are in force", 10)

    stop = asyncio.Event()
    alone = asyncio.create_task(moderates(mesh, stop))
    await asyncio.sleep(seconds / 2)
    stop.set()
    without = await alone

    stop, greedy = asyncio.Event(), Seen()
    async with autoglm.AsyncClient(mesh.ingress) as client:
        per_s = TIMES * BUDGET_PER_MINUTE / 60 / USED_PER_REQUEST
        pressed = time.monotonic()
        pressing = asyncio.create_task(offer(client, GREEDY, per_s, stop, greedy))
        # A first refusal would be too soon: what is reserved then is yet to be used. Twice the burst is steady.
        await mesh.until(lambda: greedy.used > 2 * BURST, "what it had saved up is used", 60)
        beside = asyncio.create_task(moderates(mesh, stop))
        offered_before = sum(greedy.outcomes.values())
        granted, took_s = await window(mesh, seconds)
        requests = sum(greedy.outcomes.values()) - offered_before
        stop.set()
        await pressing
        most = BURST + BUDGET_PER_MINUTE / 60 * (time.monotonic() - pressed)
        with_greedy = await beside

    budget = BUDGET_PER_MINUTE / 60 * took_s
    offered = requests * greedy.used / greedy.outcomes["ok"]  # had each been served like those that were
    failures = sum(
        seen.failures + seen.outcomes["over budget"] for run in (without, with_greedy) for seen in run.values()
    )
    served = sum(seen.outcomes["ok"] for run in (without, with_greedy) for seen in run.values())
    ratio = _p50(with_greedy) / _p50(without)
    gateway = mesh.processes("gateway")[0]
    refused = {
        reason: mesh.metric(gateway, "autoglm_budget_refusals_total", tenant=GREEDY, reason=reason)
        for reason in ("empty", "too_little_left", "too_large")
    }
    # Counted twice, by the gateway and by the client: the whole run's figures must agree to the token.
    settled = mesh.metric(gateway, "autoglm_budget_settled_tokens_total", tenant=GREEDY)
    bars = [
        Bar(
            "token limit: granted to the greedy tenant / its budget",
            f"{granted / budget:.3f} ({granted:.0f} of {budget:.0f} tokens in {took_s:.1f} s)",
            f"1 ± {TOLERANCE}",
            abs(granted / budget - 1) <= TOLERANCE,
        ),
        Bar("token limit: offered / budget", f"{offered / budget:.1f}", f">= {TIMES}", offered / budget >= TIMES),
        Bar("token limit: others' failed requests", f"{failures} of {failures + served}", "0", failures == 0),
        Bar(
            "token limit: used in the whole run / (burst + rate x time)",
            f"{settled / most:.3f}",
            "<= 1",
            settled <= most,
        ),
        Bar("token limit: settled - told to the client", f"{settled - greedy.used:+.0f}", "0", settled == greedy.used),
        Bar(
            "token limit: refusals without a time to come back, other failures",
            f"{greedy.untold}, {greedy.failures} of {sum(greedy.outcomes.values())}",
            "0, 0",
            greedy.untold == 0 and greedy.failures == 0,
        ),
    ]
    details = {
        "budget_tokens_per_minute": BUDGET_PER_MINUTE,
        "burst_tokens": BURST,
        "window_s": took_s,
        "greedy": greedy.facts(),
        "greedy_refused_by_reason": refused,
        "others_alone": {name: seen.facts() for name, seen in without.items()},
        "others_beside_the_greedy": {name: seen.facts() for name, seen in with_greedy.items()},
        "others_p50_ratio": ratio,
        "store_fallbacks": mesh.metric(gateway, "autoglm_fallback_total", kind="budget_store"),
    }
    print(
        f"others' p50 beside the greedy tenant / alone: {ratio:.2f} (a figure, no bar: the greedy tenant's own budget"
    )
    print("is work for the same cores)")
    return bars, details


def _p50(run: dict[str, Seen]) -> float:
    return statistics.median([took for seen in run.values() for took in seen.took_ms])


def _median(values: list[float]) -> float | None:
    return round(statistics.median(values), 1) if values else None


@contextmanager
def store(wanted: str, folder: Path) -> Iterator[str]:
    """Its URL: as it was given, or that of a server which lives as long as the block."""
    if wanted != "own":
        yield wanted
        return
    found = shared_cache.find("127.0.0.1", next(ports.free("127.0.0.1")))
    if found is None:
        sys.exit("neither valkey-server nor redis-server is installed (make packages): nothing was measured")
    with subprocess.Popen(found.program(folder).command, cwd=folder, stdout=subprocess.DEVNULL) as server:
        try:
            while not _answers(found.address, found.port):
                if server.poll() is not None:
                    sys.exit(f"{found.server} ended with status {server.returncode}: nothing was measured")
                time.sleep(0.02)
            yield f"redis://:{found.password}@{found.address}:{found.port}/0"
        finally:
            server.terminate()


def _answers(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=1.0).close()
    except OSError:
        return False
    return True


def main() -> int:
    """Returns 1 when a bar was missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="length of the window")
    parser.add_argument(
        "--store",
        default="",
        help="Valkey or Redis that keeps the budgets: redis://…, or `own`, started for the run; none: in process",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, store(options.store, Path(folder)) as url:
        book = Path(folder) / "budgets.toml"
        book.write_text(BOOK)
        environment = {"AUTOGLM_TOKEN_BUDGETS": str(book), "AUTOGLM_BUDGET_STORE_URL": url}
        with running("", **environment) as mesh:
            bars, details = asyncio.run(drill(mesh, options.seconds))
    details["store"] = "shared" if options.store else "in process"
    command = f"python -m benchmarks.token_limit --seconds {options.seconds:g}"
    if options.store:
        report(
            "token-limit-shared", bars, details, f"{command} --store {'own' if options.store == 'own' else 'redis://…'}"
        )
    else:
        report("token-limit", bars, details, command)
    return 1 if any(not bar.is_met for bar in bars) else 0


if __name__ == "__main__":
    sys.exit(main())
