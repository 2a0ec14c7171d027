"""A quarter of the requests is mirrored to a shadow that is dead, slow or failing: does the primary's caller notice?

    python -m benchmarks.mirroring [--rounds 16]

One Envoy under routes as in istio/components/mirror, once per kind of shadow and once without any; requests take turns
between them one by one, so a noisy machine is noisy for all alike. A second set without mirroring shows how far two
equal things differ here. The upstreams are cheap (a small grpc.aio server that streams 16 short messages 4 ms apart, in
a process of its own; the shadows sleep or refuse): on a machine with two cores a shadow that computes would slow the
primary down by using its core, which says nothing about mirroring. Ejection is off: a failing shadow goes on failing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
from scipy.stats import binom

from benchmarks.harness import Bar, report
from services.mesh import envoy
from services.mesh import ports as free_ports
from services.mesh.envoy import Admin
from services.mesh.policy import load
from services.mesh.registry import Endpoint, Registry, Service, ServicePort
from services.mesh.rundir import write_atomically
from services.mesh.translate import NodeSettings, translate

REPOSITORY = Path(__file__).resolve().parents[1]
SHADOWS = ("dead", "slow", "failing")
MODES = ("none", "again", *SHADOWS)
"""`again` is a second `none`: what differs between the two is noise."""
PERCENT = 25
MESSAGES, GAP_S = 16, 0.004
SLOW_S = 1.0
REQUESTS, CONCURRENCY = 120, 4
"""Requests per mode and round; p99 of a round is its second slowest."""
METHOD = "/autoglm.sparse_inference.v1.SparseInferenceService/Generate"
HOST = "sparse-inference.autoglm.svc.cluster.local"
BAR = 1.05


def policy_files(folder: Path) -> None:
    """A route per mode, chosen by a header; each shadow is a subset of its own."""
    route = {"destination": {"host": "sparse-inference", "subset": "primary"}}
    routes: list[dict[str, Any]] = []
    for mode in MODES:
        entry = {"name": mode, "match": [{"headers": {"x-mode": {"exact": mode}}}], "route": [route]}
        if mode in SHADOWS:
            shadow = {"host": "sparse-inference", "subset": mode}
            entry["mirrors"] = [{"destination": shadow, "percentage": {"value": PERCENT}}]
        routes.append(entry)
    subsets = [{"name": name, "labels": {"version": name}} for name in ("primary", *SHADOWS)]
    objects = [
        {"kind": "VirtualService", "spec": {"hosts": ["sparse-inference"], "http": routes}},
        {
            "kind": "DestinationRule",
            "spec": {
                "host": "sparse-inference",
                "subsets": subsets,
                "trafficPolicy": {"connectionPool": {"tcp": {"connectTimeout": "1s"}}},
            },
        },
    ]
    folder.mkdir()
    for item in objects:
        head = {"apiVersion": "networking.istio.io/v1", "metadata": {"name": "workers", "namespace": "autoglm"}}
        (folder / f"{item['kind']}.yaml").write_text(json.dumps(head | item))


class Upstream(grpc.GenericRpcHandler):
    """Streams like a worker, answers late, or refuses."""

    def __init__(self, kind: str) -> None:
        self.kind, self.seen = kind, 0

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        if str(handler_call_details.method).endswith("/Seen"):
            return grpc.unary_unary_rpc_method_handler(self._count)
        return grpc.unary_stream_rpc_method_handler(self._answer)

    async def _count(self, request: bytes, context: Any) -> bytes:
        return str(self.seen).encode()

    async def _answer(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        self.seen += 1
        if self.kind == "failing":
            context.set_code(grpc.StatusCode.UNAVAILABLE)
            context.set_details("not today")
            return
        if self.kind == "slow":
            await asyncio.sleep(SLOW_S)
        for _ in range(MESSAGES):
            yield b"x" * 64
            await asyncio.sleep(GAP_S)


async def serve(kind: str) -> None:
    """The upstream's process: prints its port and serves until it is ended."""
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Upstream(kind),))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await server.wait_for_termination()


@asynccontextmanager
async def upstream(kind: str) -> AsyncIterator[int]:
    """A process of its own; yields its port."""
    command = (sys.executable, "-m", "benchmarks.mirroring", "--serve", kind)
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, cwd=REPOSITORY)
    assert process.stdout is not None
    try:
        yield int(await process.stdout.readline())
    finally:
        process.terminate()
        await process.wait()


@asynccontextmanager
async def proxy(ports: dict[str, int], root: Path) -> AsyncIterator[NodeSettings]:
    """A real Envoy under the policy, with these upstreams."""
    policy_files(root / "policy")
    endpoints = tuple(Endpoint("127.0.0.1", port, {"version": name}) for name, port in ports.items())
    service = Service("sparse-inference", "autoglm", (ServicePort("grpc", 50051, "grpc"),), {"grpc": endpoints})
    supply = free_ports.free("127.0.0.1")
    outbound, ingress, admin_port = (next(supply) for _ in range(3))
    node = NodeSettings(root / "envoy", outbound_port=outbound, ingress_port=ingress, admin_port=admin_port)
    snapshot = translate(load(root / "policy"), Registry((service,)), node)
    for name, content in snapshot.files().items():
        write_atomically(node.run_directory / name, content.decode())
    command = envoy.command(node.run_directory / "bootstrap.json", 1)
    with (root / "envoy.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log)
    try:
        admin = Admin("127.0.0.1", admin_port)
        while not await admin.is_live():  # noqa: ASYNC110  # another process; it cannot signal us
            await asyncio.sleep(0.02)
        yield node
    finally:
        process.terminate()
        await process.wait()


async def one(calls: grpc.aio.Channel, mode: str, failures: list[str]) -> tuple[float, float]:
    """Milliseconds to the first message and to the end; a call that fails is noted and counts with its time."""
    began = time.perf_counter()
    first = 0.0
    try:
        async for _ in calls.unary_stream(METHOD)(b"prompt", metadata=(("x-mode", mode),), timeout=30):
            first = first or time.perf_counter() - began
    except grpc.aio.AioRpcError as error:
        failures.append(f"{mode}: {error.code().name} {error.details()}")
    return first * 1e3, (time.perf_counter() - began) * 1e3


async def one_round(
    calls: grpc.aio.Channel, requests: int, failures: list[str]
) -> dict[str, list[tuple[float, float]]]:
    """All modes by turns, a few at a time."""
    found: dict[str, list[tuple[float, float]]] = {mode: [] for mode in MODES}
    waiting = iter([mode for _ in range(requests) for mode in MODES])

    async def work() -> None:
        for mode in waiting:
            found[mode].append(await one(calls, mode, failures))

    async with asyncio.TaskGroup() as group:
        for _ in range(CONCURRENCY):
            group.create_task(work())
    return found


def p99(values: Sequence[float]) -> float:
    """The value that one in a hundred exceeds."""
    return statistics.quantiles(values, n=100, method="inclusive")[98]


def ratios(rounds: Sequence[dict[str, list[tuple[float, float]]]], mode: str, part: int) -> list[float]:
    """Per round: p99 of the mode over the p99 of both sets without mirroring."""
    found = []
    for answers in rounds:
        plain = [item[part] for item in answers["none"]]
        base = plain if mode == "again" else plain + [item[part] for item in answers["again"]]
        found.append(p99([item[part] for item in answers[mode]]) / p99(base))
    return found


async def measure(rounds: int, requests: int) -> tuple[list[Bar], dict[str, Any]]:
    """Runs everything."""
    async with AsyncExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ports = {kind: await stack.enter_async_context(upstream(kind)) for kind in ("primary", "slow", "failing")}
        ports["dead"] = next(free_ports.free("127.0.0.1"))
        node = await stack.enter_async_context(proxy(ports, root))
        options = [("grpc.default_authority", HOST), ("grpc.enable_retries", 0)]
        calls = await stack.enter_async_context(
            grpc.aio.insecure_channel(f"127.0.0.1:{node.outbound_port}", options=options)
        )
        failures: list[str] = []
        await one_round(calls, 10, [])
        before = await _mirrored(ports, node)
        answers = []
        for number in range(rounds):
            answers.append(await one_round(calls, requests, failures))
            shown = " ".join(f"{mode} {ratios(answers[-1:], mode, 1)[0]:.3f}" for mode in MODES[1:])
            print(f"round {number + 1}/{rounds}: p99 of the whole answer against none: {shown}", flush=True)
        after = await _mirrored(ports, node)
        mirrored = {name: after[name] - before[name] for name in SHADOWS}
    bars = []
    sent = rounds * requests
    low, high = (int(edge) for edge in binom.interval(0.99, sent, PERCENT / 100))
    details: dict[str, Any] = {"rounds": rounds, "requests_per_mode_and_round": requests, "concurrency": CONCURRENCY}
    for mode in SHADOWS:
        count = mirrored[mode]
        bars.append(Bar(f"{mode} shadow: mirrored", f"{count}/{sent}", f"{low}…{high}", low <= count <= high))
        whole = statistics.median(ratios(answers, mode, 1))
        bars.append(Bar(f"{mode} shadow: p99 of the whole answer", f"{whole:.3f}×", f"≤{BAR}×", whole <= BAR))
    for mode in MODES[1:]:
        details[mode] = {
            name: _summary(ratios(answers, mode, part)) for part, name in ((1, "whole answer"), (0, "first message"))
        }
    everything = {
        mode: {
            name: {"p50_ms": round(statistics.median(values), 2), "p99_ms": round(p99(values), 2)}
            for part, name in ((1, "whole answer"), (0, "first message"))
            if (values := [item[part] for answer in answers for item in answer[mode]])
        }
        for mode in MODES
    }
    bars.append(Bar("failed requests, all modes", f"{len(failures)}/{sent * len(MODES)}", "0", not failures))
    return bars, details | {"all rounds together": everything, "failures": failures[:20]}


def _summary(values: Sequence[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": round(middle, 3), "quartile_1": round(low, 3), "quartile_3": round(high, 3)}


async def _mirrored(ports: dict[str, int], node: NodeSettings) -> Counter[str]:
    """Requests that each shadow got; of the dead one, those that Envoy could not deliver."""
    found: Counter[str] = Counter()
    for kind in ("slow", "failing"):
        async with grpc.aio.insecure_channel(f"127.0.0.1:{ports[kind]}") as channel:
            found[kind] = int(await channel.unary_unary("/x/Seen")(b""))
    name = f"cluster.outbound|50051|dead|{HOST};.upstream_rq_total"
    counters = await Admin("127.0.0.1", node.admin_port).counters("dead.*upstream_rq_(total|pending_failure_eject)$")
    found["dead"] = counters.get(name.replace("upstream_rq_total", "upstream_rq_pending_failure_eject"), 0)
    return found


def main() -> None:
    """Measures, prints a line per bar and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=16, help="at least 2, as the spread between them is told")
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.serve:
        asyncio.run(serve(chosen.serve))
        return
    bars, details = asyncio.run(measure(max(2, chosen.rounds), chosen.requests))
    load_average = os.getloadavg()[0]
    command = f"python -m benchmarks.mirroring --rounds {chosen.rounds}"
    report("mirroring", bars, details | {"load_average_at_the_end": round(load_average, 1)}, command)
    raise SystemExit(0 if all(bar.is_met for bar in bars) else 1)


if __name__ == "__main__":
    main()
