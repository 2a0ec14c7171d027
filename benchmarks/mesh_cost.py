"""What Envoy costs: the same tokenizer and worker, reached through ingress and mutual-TLS sidecars, and directly.

Four ways to ask, in turn, so that whatever else the machine does hits all of them:
  whole     client → ingress → gateway → tokenizer, worker: every arrow through two proxies with mutual TLS
  unpicked  the same under a policy without an InferencePool: Envoy alone, without the scheduler's part
  door      client → the gateway's own port; what the gateway calls still goes through Envoy
  direct    client → a second gateway that calls tokenizer and worker at their own ports: no Envoy anywhere
One worker with one thread, prompts below a block of cache (nobody asks the cache), no trace recorded by anyone. Rates
are those of long answers: their beginnings have a bar of their own.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

import autoglm

from benchmarks.harness import MODEL, REPOSITORY, Bar, Mesh
from services.mesh import ports

REPLICAS = "sparse-inference/v1=1"
STREAMS = 8
WANTED_MS, WANTED_LOSS = 1.5, 0.03
UNRECORDED = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"


@contextmanager
def direct_gateway(mesh: Mesh) -> Iterator[str]:
    """A gateway beside the mesh's own; its address."""
    supply = ports.free("127.0.0.1")
    address = f"127.0.0.1:{next(supply)}"
    peers = {name: mesh.processes(name)[0].ports["grpc"] for name in ("tokenizer", "sparse-inference")}
    environment = os.environ | {
        "AUTOGLM_INSTANCE": "direct",
        "AUTOGLM_GRPC_PORT": address.rpartition(":")[2],
        "AUTOGLM_REST_PORT": str(next(supply)),
        "AUTOGLM_METRICS_PORT": str(next(supply)),
        "AUTOGLM_OTLP_ENDPOINT": mesh.state.addresses.otlp,
        "AUTOGLM_DIRECT": ",".join(f"{name}=127.0.0.1:{port}" for name, port in peers.items()),
        "PYTHONPATH": os.pathsep.join((str(REPOSITORY), str(REPOSITORY / "sdk"))),
        "PYTHONUNBUFFERED": "1",
    }
    log = mesh.directory.log("direct-gateway")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.direct_gateway"], env=environment, stdout=output, stderr=output
        )
    try:
        while b'"message": "ready"' not in log.read_bytes():
            if process.poll() is not None:
                raise RuntimeError(f"the direct gateway did not start: {log.read_text()[-2000:]}")
            time.sleep(0.05)
        yield address
    finally:
        process.terminate()
        process.wait()


async def first_token_ms(caller: autoglm.AsyncClient, number: int) -> float:
    """From the call to the first text."""
    began = time.perf_counter()
    async with stream(caller, number, 2) as events:
        async for event in events:
            if isinstance(event, autoglm.Delta):
                return (time.perf_counter() - began) * 1e3
    raise AssertionError("an answer without text")


async def tokens_per_s(caller: autoglm.AsyncClient, round_number: int, tokens: int) -> float:
    """Of `STREAMS` streams at once, over all of them."""

    async def one(number: int) -> int:
        async with stream(caller, number, tokens) as events:
            async for event in events:
                if isinstance(event, autoglm.Done):
                    return event.usage.completion_tokens
        return 0

    began = time.perf_counter()
    counts = await asyncio.gather(*(one(1000 * round_number + number) for number in range(STREAMS)))
    return sum(counts) / (time.perf_counter() - began)


def stream(caller: autoglm.AsyncClient, number: int, tokens: int) -> Any:
    """The same request for every way of asking."""
    return caller.stream(
        f"x = {number}",
        model=MODEL,
        max_tokens=tokens,
        temperature=0.8,
        seed=number,
        ignore_eos=True,
        timeout=120,
        metadata={"traceparent": UNRECORDED},
    )


def processor_s(pid: int) -> float:
    """Processor time of a process so far: steadier than clocks where others use the machine, too."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def compare(
    ways: dict[str, autoglm.AsyncClient], envoy: int, requests: int, rounds: int, tokens: int
) -> dict[str, Any]:
    """First tokens and rates of each way, taken in turn; every second turn runs backwards.

    Also the milliseconds that the process `envoy` worked for each request of each way, and for each token.
    """
    firsts: dict[str, list[float]] = {name: [] for name in ways}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    worked_ms = {name: {"per_request": 0.0, "per_token": 0.0} for name in ways}
    for number in range(-10, requests):
        for name, caller in _in_turn(ways, number):
            before = processor_s(envoy)
            took = await first_token_ms(caller, abs(number))
            if number >= 0:
                firsts[name].append(took)
                worked_ms[name]["per_request"] += (processor_s(envoy) - before) * 1e3 / requests
    for number in range(-1, rounds):
        for name, caller in _in_turn(ways, number):
            before = processor_s(envoy)
            rate = await tokens_per_s(caller, abs(number), tokens)
            if number >= 0:
                rates[name].append(rate)
                worked_ms[name]["per_token"] += (processor_s(envoy) - before) * 1e3 / (rounds * tokens * STREAMS)
    return {"first_token_ms": firsts, "tokens_per_s": rates, "envoy_ms": worked_ms}


async def drill(
    mesh: Mesh, requests: int = 120, rounds: int = 8, tokens: int = 400
) -> tuple[list[Bar], dict[str, Any]]:
    """With the policy as it stands, then without its InferencePool."""
    with direct_gateway(mesh) as direct:
        door = f"127.0.0.1:{mesh.processes('gateway')[0].ports['grpc']}"
        async with AsyncExitStack() as stack:
            ways = {
                name: await stack.enter_async_context(autoglm.AsyncClient(address))
                for name, address in (("whole", mesh.ingress), ("door", door), ("direct", direct))
            }
            envoy = mesh.processes("envoy")[0].pid
            assert envoy is not None
            picked = await compare(ways, envoy, requests, rounds, tokens)
            version = mesh.state.policy.version
            listed = mesh.policy / "kustomization.yaml"
            listed.write_text(listed.read_text().replace("  - inference-pool.yaml\n", ""))
            (mesh.policy / "inference-pool.yaml").unlink()
            await mesh.until(lambda: mesh.state.policy.version != version, "the policy without a pool is in force")
            alone = await compare(
                {"unpicked": ways["whole"], "direct": ways["direct"]}, envoy, requests, rounds, tokens
            )
    handshakes = mesh.envoy_stat("ssl.handshake")
    added = {
        "whole": _added(picked, "whole", "direct"),
        "ingress and the gateway's sidecar": _added(picked, "whole", "door"),
        "without the picker": _added(alone, "unpicked", "direct"),
    }
    loss = {"whole": _loss(picked, "whole"), "without the picker": _loss(alone, "unpicked")}
    bars = [
        Bar(f"added before the first token, {name}", _shown(values), f"≤{WANTED_MS} ms", values["p50"] <= WANTED_MS)
        for name, values in added.items()
    ]
    bars += [
        Bar(f"tokens/s lost at {STREAMS} streams, {name}", f"{value:.1%}", f"≤{WANTED_LOSS:.0%}", value <= WANTED_LOSS)
        for name, value in loss.items()
    ]
    bars.append(Bar("mutual TLS was in the path", f"{handshakes} handshakes", ">0", handshakes > 0))
    details = {
        "requests": requests,
        "rounds": rounds,
        "tokens": tokens,
        "load_average": os.getloadavg(),
        "added_ms": added,
        "loss": loss,
        "with_picker": _summary(picked),
        "without_picker": _summary(alone),
    }
    return bars, details


def _in_turn(ways: dict[str, autoglm.AsyncClient], number: int) -> list[tuple[str, autoglm.AsyncClient]]:
    order = list(ways.items())
    return order if number % 2 == 0 else order[::-1]


def _added(measured: dict[str, Any], way: str, base: str) -> dict[str, float]:
    """Difference of the medians, and how far apart the paired differences lie."""
    mine, theirs = measured["first_token_ms"][way], measured["first_token_ms"][base]
    low, _, high = statistics.quantiles([a - b for a, b in zip(mine, theirs, strict=True)], n=4)
    return {"p50": statistics.median(mine) - statistics.median(theirs), "quartile_1": low, "quartile_3": high}


def _loss(measured: dict[str, Any], way: str) -> float:
    """The median over rounds of how much slower this way was than the direct one of the same round."""
    pairs = zip(measured["tokens_per_s"][way], measured["tokens_per_s"]["direct"], strict=True)
    return statistics.median(1 - mine / theirs for mine, theirs in pairs)


def _shown(values: dict[str, float]) -> str:
    return f"{values['p50']:.2f} ms (middle half {values['quartile_1']:.2f}…{values['quartile_3']:.2f})"


def _summary(measured: dict[str, Any]) -> dict[str, Any]:
    """Medians with quartiles."""
    found: dict[str, Any] = {"envoy_ms": measured["envoy_ms"]}
    for kind, ways in ((kind, ways) for kind, ways in measured.items() if kind != "envoy_ms"):
        for way, values in ways.items():
            low, middle, high = statistics.quantiles(values, n=4)
            found.setdefault(kind, {})[way] = {"p50": middle, "quartile_1": low, "quartile_3": high}
    return found
