"""`python -m benchmarks.cloud_failover`: a whole cloud lost under load, silently and by kill -9; a canary in one cloud.

Needs root, for network namespaces. Requests come in at a steady rate at two clouds whose policy sends part of them to
the third. That one vanishes: its cable is pulled (no packet, no reset), or its processes are killed. Then it returns.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import autoglm
from scipy.stats import binom

from benchmarks.clouds import Clouds, running_clouds
from benchmarks.harness import MODEL, Bar, report
from services.mesh.clouds import network

DOORS = ("aws", "gcp")
LOST = "azure"
LOST_REGION = "eastus"
SHARE = 30
"""Percent of the requests of each door that go to the cloud that will be lost."""
RATE = 2.0
"""Requests a second at each door: the machine has two cores for three clouds."""
STREAMS = 2
"""Long answers that the lost cloud is giving when it goes."""
LONG = 1800
HANG_S = 20.0
"""What has not ended by then counts as hanging."""
RAMP_S = 10.0
GATEWAYS = "outbound_.50051_._.gateway"
CANARY_PERCENT = 5
CANARY_REQUESTS = 600
GENERATE = "/Generate"
REPLICAS = "sparse-inference/v1=1,azure:sparse-inference/canary=1"


@dataclass(frozen=True, slots=True)
class Sent:
    """One request: when it began and ended (Unix seconds), and how."""

    began: float
    ended: float
    outcome: str

    @property
    def is_ok(self) -> bool:
        return self.outcome == "ok"


class Traffic:
    """A steady open-loop load at the doors; every request is remembered."""

    def __init__(self, clouds: Clouds) -> None:
        self._callers = {name: autoglm.AsyncClient(clouds.ingress(name), token=clouds.token()) for name in DOORS}
        self._tasks: set[asyncio.Task[None]] = set()
        self.sent: list[Sent] = []
        self._number = 0

    async def run(self) -> None:
        """Until cancelled."""
        due = time.monotonic()
        while True:
            for name in DOORS:
                self._number += 1
                task = asyncio.create_task(self._remember(self._callers[name], self._number))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            due += 1 / RATE
            await asyncio.sleep(max(0.0, due - time.monotonic()))

    async def stream(self, name: str, number: int) -> Sent:
        """A long answer from the cloud that will be lost, asked for at a door."""
        return await ask(self._callers[name], 1_000_000 + number, LONG, {"x-data-region": LOST})

    async def close(self) -> None:
        await asyncio.gather(*self._tasks)
        for caller in self._callers.values():
            await caller.close()

    async def _remember(self, caller: autoglm.AsyncClient, number: int) -> None:
        self.sent.append(await ask(caller, number, 4, {}))


async def ask(caller: autoglm.AsyncClient, number: int, tokens: int, metadata: dict[str, str]) -> Sent:
    """One request, to its end or to HANG_S."""
    began, outcome = time.time(), "hung"
    try:
        async with asyncio.timeout(HANG_S * (3 if tokens == LONG else 1)):
            stream = caller.stream(
                f"# {number}\n",
                model=MODEL,
                max_tokens=tokens,
                seed=number,
                ignore_eos=True,
                timeout=600,
                metadata=metadata,
            )
            async with stream as events:
                async for _ in events:
                    pass
        outcome = "ok"
    except autoglm.AutoglmError as error:
        outcome = type(error).__name__
    except TimeoutError:
        pass
    return Sent(began, time.time(), outcome)


@dataclass(frozen=True, slots=True)
class Loss:
    """One loss of the cloud and its return, all times in Unix seconds."""

    kind: str
    cut: float
    detected: float
    back: float
    end: float
    streams: tuple[Sent, ...]


async def lose(
    clouds: Clouds, traffic: Traffic, kind: str, cut: Callable[[], None], mend: Callable[[], Awaitable[None]]
) -> Loss:
    """Long answers begin, the cloud goes, stays away, returns."""
    streams = [asyncio.create_task(traffic.stream(DOORS[n % 2], n)) for n in range(STREAMS)]
    await asyncio.sleep(1.5)
    at = time.time()
    cut()
    await _until(
        clouds, lambda: all(LOST_REGION not in clouds.places(name, GATEWAYS) for name in DOORS), "it is missed"
    )
    detected = time.time()
    ended = tuple(await asyncio.gather(*streams))
    await asyncio.sleep(max(0.0, at + 8.0 - time.time()))
    await mend()
    await _until(
        clouds, lambda: all(LOST_REGION in clouds.places(name, GATEWAYS) for name in DOORS), "it is back", 240.0
    )
    back = time.time()
    await asyncio.sleep(2 * RAMP_S)
    return Loss(kind, at, detected, back, time.time(), ended)


async def drill(clouds: Clouds, silent: int = 3, killed: int = 1) -> tuple[list[Bar], dict[str, Any]]:
    """Losses of both kinds, and what the callers saw of them."""
    for name in DOORS:
        clouds.edit(f"clouds/{name}/distribution.yaml", _share)
    await asyncio.sleep(2.0)
    traffic = Traffic(clouds)
    load = asyncio.create_task(traffic.run())
    await asyncio.sleep(10.0)
    losses = []
    for _ in range(silent):

        async def plug() -> None:
            await asyncio.to_thread(clouds.plug, LOST)

        losses.append(await lose(clouds, traffic, "silent", lambda: clouds.pull(LOST), plug))
    for _ in range(killed):

        async def wait() -> None:
            await _until(clouds, lambda: clouds.is_up(LOST), "it is started again", 240.0)

        losses.append(await lose(clouds, traffic, "killed", lambda: _kill(clouds), wait))
    load.cancel()
    await asyncio.gather(load, return_exceptions=True)
    await traffic.close()
    await asyncio.sleep(11.0)  # Envoy writes its access log every ten seconds
    served = clouds.served(LOST, "gateway~inbound", GENERATE)
    bars = [bar for kind in ("silent", "killed") for bar in _bars(kind, losses, traffic.sent, served)]
    details = {
        "rate_per_door": RATE,
        "share_percent": SHARE,
        "load_average": os.getloadavg(),
        "requests": len(traffic.sent),
        "outcomes": dict(Counter(item.outcome for item in traffic.sent)),
        "losses": [_told(loss, traffic.sent, served) for loss in losses],
        "heard_and_not": {name: clouds.said(name, "heard") for name in DOORS},
    }
    return bars, details


async def canary(clouds: Clouds) -> tuple[list[Bar], dict[str, Any]]:
    """5 % of one cloud's requests to another version, by an edit of that cloud's overlay."""
    before = {name: clouds.mesh(name).policy.version for name in DOORS}
    clouds.edit(f"clouds/{LOST}/distribution.yaml", lambda text: _only(text, LOST_REGION))
    clouds.edit(f"clouds/{LOST}/canary.yaml", _dial)
    wanted = {95, CANARY_PERCENT}
    await _until(
        clouds, lambda: {item.weight for item in clouds.mesh(LOST).policy.weights} == wanted, "the new weights"
    )
    await asyncio.sleep(12.0)  # what came before is in the access log, too
    known = {
        name: len(clouds.served(LOST, f"sparse-inference-{name}-0~inbound", GENERATE)) for name in ("v1", "canary")
    }
    outcomes: Counter[str] = Counter()
    numbers = iter(range(CANARY_REQUESTS))
    async with autoglm.AsyncClient(clouds.ingress(LOST), token=clouds.token()) as caller:

        async def work() -> None:
            for number in numbers:
                outcomes[(await ask(caller, 2_000_000 + number, 1, {})).outcome] += 1

        await asyncio.gather(*(work() for _ in range(4)))
    await asyncio.sleep(12.0)
    counts = {
        name: len(clouds.served(LOST, f"sparse-inference-{name}-0~inbound", GENERATE)) - count
        for name, count in known.items()
    }
    total = sum(counts.values())
    low, high = binom.interval(0.99, total, CANARY_PERCENT / 100)
    failures = CANARY_REQUESTS - outcomes["ok"]
    after = {name: clouds.mesh(name).policy.version for name in DOORS}
    bars = [
        Bar(
            f"canary in {LOST}: {CANARY_PERCENT} % of {total}",
            str(counts["canary"]),
            f"{low:.0f} to {high:.0f} (binomial, 99 %)",
            low <= counts["canary"] <= high and total >= CANARY_REQUESTS,
        ),
        Bar("canary: failed requests", f"{failures}/{CANARY_REQUESTS}", "0", failures == 0),
        Bar(
            "canary: other clouds' policy", "untouched" if after == before else "changed", "untouched", after == before
        ),
    ]
    return bars, {"canary": {"counts": counts, "outcomes": dict(outcomes), "interval": [low, high]}}


def _bars(kind: str, losses: list[Loss], sent: list[Sent], served: list[float]) -> list[Bar]:
    ours = [loss for loss in losses if loss.kind == kind]
    if not ours:
        return []
    after = [item for loss in ours for item in sent if loss.detected <= item.began < loss.end]
    failed = sum(not item.is_ok for item in after)
    streams = [item for loss in ours for item in loss.streams]
    typed = sum(item.outcome not in ("ok", "hung") for item in streams)
    ends = [item.ended - loss.cut for loss in ours for item in loss.streams]
    hung = sum(item.outcome == "hung" for item in [*streams, *sent])
    recovery = [_recovery_s(loss, sent) for loss in ours]
    first = _share_of([(loss.back, loss.back + RAMP_S / 2) for loss in ours], sent, served)
    later = _share_of([(loss.back + RAMP_S, loss.end) for loss in ours], sent, served)
    low, high = binom.interval(0.99, later.asked, SHARE / 100)
    return [
        Bar(f"{kind}: new requests failed after detection", f"{failed}/{len(after)}", "0", failed == 0),
        Bar(
            f"{kind}: answers under way there that ended in a typed error",
            f"{typed}/{len(streams)}",
            "all",
            typed == len(streams),
        ),
        Bar(f"{kind}: the last of them ended after", f"{max(ends):.2f} s", "5 s", max(ends) <= 5.0),
        Bar(f"{kind}: requests or answers that hung", str(hung), "0", hung == 0),
        Bar(
            f"{kind}: time to recover, worst of {len(ours)} (p99)",
            f"{max(recovery):.2f} s",
            "3 s",
            max(recovery) <= 3.0,
        ),
        Bar(
            f"{kind}: its share in the first {RAMP_S / 2:g} s after the return",
            f"{first.served}/{first.asked}",
            f"at most half of {SHARE} %",
            first.served <= first.asked * SHARE / 200,
        ),
        Bar(
            f"{kind}: its share from {RAMP_S:g} s after the return on",
            f"{later.served}/{later.asked}",
            f"{low:.0f} to {high:.0f} ({SHARE} %, binomial, 99 %)",
            low <= later.served <= high,
        ),
    ]


def _recovery_s(loss: Loss, sent: list[Sent]) -> float:
    """From the cut until no caller sees anything of it: the end of the last request that failed or was held up."""
    return max((item.ended for item in _hurt(loss, sent)), default=loss.cut) - loss.cut


def _hurt(loss: Loss, sent: list[Sent]) -> list[Sent]:
    """Requests around the loss that failed, or took two seconds more than 99 % did before the first loss."""
    usual = sorted(item.ended - item.began for item in sent if item.is_ok and item.ended < loss.cut)
    held_up = 2.0 + usual[int(0.99 * (len(usual) - 1))] if usual else 2.0
    return [
        item
        for item in sent
        if loss.cut - 1.0 <= item.began < loss.back
        and item.ended > loss.cut
        and (not item.is_ok or item.ended - item.began > held_up)
    ]


@dataclass(frozen=True, slots=True)
class Share:
    """Of so many requests asked at the doors, so many came to the lost cloud."""

    served: int
    asked: int


def _share_of(spans: list[tuple[float, float]], sent: list[Sent], served: list[float]) -> Share:
    return Share(
        sum(start <= at < end for at in served for start, end in spans),
        sum(start <= item.began < end for item in sent for start, end in spans),
    )


def _told(loss: Loss, sent: list[Sent], served: list[float]) -> dict[str, Any]:
    between = [item for item in sent if loss.cut <= item.began < loss.detected]
    return {
        "kind": loss.kind,
        "detected_s": loss.detected - loss.cut,
        "away_s": loss.back - loss.cut,
        "failed_before_detection": sum(not item.is_ok for item in between),
        "requests_before_detection": len(between),
        "recovery_s": _recovery_s(loss, sent),
        "hurt": [
            {"began_s": item.began - loss.cut, "took_s": item.ended - item.began, "outcome": item.outcome}
            for item in _hurt(loss, sent)
        ],
        "streams": [{"outcome": item.outcome, "ended_s": item.ended - loss.cut} for item in loss.streams],
        "served_by_second_after_return": [
            _share_of([(loss.back + n, loss.back + n + 1)], sent, served).served for n in range(int(2 * RAMP_S))
        ],
    }


def _kill(clouds: Clouds) -> None:
    clouds.kill(LOST)


def _share(text: str) -> str:
    """The lost cloud gets its share of this door, the door's own cloud the rest."""
    lines = [line for line in text.splitlines() if "/*:" not in line]
    own = next(line for line in text.splitlines() if line.endswith(": 80")).strip().partition(":")[0]
    pad = " " * 14
    return "\n".join([*lines, f"{pad}{own}: {100 - SHARE}", f"{pad}{LOST_REGION}/*: {SHARE}", ""])


def _only(text: str, region: str) -> str:
    lines = [line for line in text.splitlines() if "/*:" not in line]
    return "\n".join([*lines, f"{' ' * 14}{region}/*: 100", ""])


def _dial(text: str) -> str:
    return text.replace("weight, value: 100", "weight, value: 95").replace(
        "weight, value: 0", f"weight, value: {CANARY_PERCENT}"
    )


async def _until(clouds: Clouds, condition: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
    await asyncio.to_thread(clouds.until, condition, what, timeout_s)


def main() -> int:
    """Returns 1 when a bar was missed."""
    if not network.is_possible():
        print("network namespaces need root, ip and nsenter: nothing was measured", file=sys.stderr)
        return 2
    with running_clouds(AUTOGLM_CLOUDS_REPLICAS=REPLICAS, AUTOGLM_CLOUDS_RESTART_S="8") as clouds:
        bars, details = asyncio.run(drill(clouds))
        more, others = asyncio.run(canary(clouds))
    report("cloud-failover", bars + more, details | others, "python -m benchmarks.cloud_failover")
    return 1 if any(not bar.is_met for bar in bars + more) else 0


if __name__ == "__main__":
    sys.exit(main())
