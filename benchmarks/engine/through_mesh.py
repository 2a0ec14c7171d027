"""Eight streams through gateway, Envoy, scheduler, tokenizer and worker, against the same eight in the bare engine.

The bare engine is the step loop in this process with the same packed weights, prompts, sampling and threads. Both arms
count tokens while all eight streams are decoding. The client runs on the same processors and is part of the cost.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import autoglm
import autoglm_kernels as kernels
import yaml
from tokenizers import Tokenizer

from benchmarks import random_checkpoints
from benchmarks.engine import streams, tiny
from benchmarks.harness import REPOSITORY, Bar, Mesh, running
from benchmarks.peers.shapes import SHAPES
from engine.checkpoints.opening import open_checkpoint
from engine.checkpoints.packed import pack_or_open
from engine.executors.native import NativeExecutor
from engine.precision.plan import plan_for
from engine.runtime.loop import Limits
from engine.runtime.sampling import Sampling

STREAMS = 8
WANTED = 0.95
PAGES = 2048


@dataclass
class Seen:
    """One stream as its caller saw it; the times of its first and last text."""

    times: list[float] = field(default_factory=list)
    tokens: int = 0


def topology(model: Path, name: str) -> dict[str, Any]:
    """The laptop's mesh with another model and a single worker of two threads."""
    found: dict[str, Any] = yaml.safe_load((REPOSITORY / "deploy/local/mesh.yaml").read_text())
    services = found["services"]
    services["tokenizer"]["environment"]["AUTOGLM_MODELS"] = f"{name}={model}"
    worker = services["sparse-inference"]
    worker["environment"] |= {
        "AUTOGLM_MODEL_DIR": str(model),
        "AUTOGLM_MODEL_NAME": name,
        "AUTOGLM_THREADS": "2",
        "AUTOGLM_SPECULATION": "off",
    }
    worker["replicas"][0]["count"] = 1
    return found


def prompt(number: int) -> str:
    return f"# request {number}\ndef function_{number}(value):\n"


async def through(mesh: Mesh, name: str, new: int) -> list[Seen]:
    """`STREAMS` streams at once."""

    async def one(caller: autoglm.AsyncClient, number: int) -> Seen:
        seen = Seen()
        stream = caller.stream(
            prompt(number), model=name, max_tokens=new, temperature=0.8, seed=number, ignore_eos=True, timeout=300
        )
        async with stream as events:
            async for event in events:
                if isinstance(event, autoglm.Delta):
                    seen.times.append(time.perf_counter())
                elif isinstance(event, autoglm.Done):
                    seen.tokens = event.usage.completion_tokens
        return seen

    async with autoglm.AsyncClient(mesh.ingress) as caller:
        return list(await asyncio.gather(*(one(caller, number) for number in range(STREAMS))))


def rate(found: list[Seen]) -> float:
    """Tokens per second of all streams: each from its first text to its last."""
    return sum((seen.tokens - 1) / (seen.times[-1] - seen.times[0]) for seen in found)


def bare(executor: NativeExecutor, model: Path, new: int) -> float:
    """The same requests in the loop of this process; tokens per second counted the same way."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    with streams.running(executor, Limits()) as loop:
        asked = [
            streams.ask(loop, tokenizer.encode(prompt(n)).ids, new, Sampling(temperature=0.8, seed=n))
            for n in range(STREAMS)
        ]
        for stream in asked:
            stream.wait()
    return sum((len(s.token_ids) - 1) / (s.times[-1] - s.times[0]) for s in asked)


def cpu_seconds(pids: dict[str, int]) -> dict[str, float]:
    """Processor time of each process so far."""
    tick = os.sysconf("SC_CLK_TCK")
    found = {}
    for name, pid in pids.items():
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        found[name] = (int(fields[11]) + int(fields[12])) / tick
    return found


def measure(name: str, model: Path, precision: str, new: int, rounds: int) -> dict[str, Any]:
    """Rounds of both, in turn: the mesh idles while the bare engine runs."""
    checkpoint = open_checkpoint(model)
    plan = plan_for(precision, checkpoint.architecture, True)
    with tempfile.TemporaryDirectory() as folder:
        cache, file = Path(folder), Path(folder, "mesh.yaml")
        weights = pack_or_open(checkpoint, plan, cache / "packed", 2, lambda done, total: None)
        executor = NativeExecutor(checkpoint.architecture, plan, weights, kernels.Device(2, False, ""), PAGES)
        file.write_text(yaml.safe_dump(topology(model, name)))
        mesh_rates: list[float] = []
        bare_rates: list[float] = []
        with running(
            timeout_s=180.0,
            AUTOGLM_TOPOLOGY=str(file),
            AUTOGLM_MODEL=name,
            AUTOGLM_CACHE_DIR=str(cache),
            AUTOGLM_PRECISION=precision,
        ) as mesh:
            asyncio.run(through(mesh, name, 8))
            pids = {process.name: process.pid for process in mesh.state.processes if process.pid is not None}
            spent = dict.fromkeys(pids, 0.0)
            own_s, took, tokens, messages = 0.0, 0.0, 0, 0
            for _ in range(rounds):
                bare_rates.append(bare(executor, model, new))
                before, own, began = cpu_seconds(pids), time.process_time(), time.perf_counter()
                seen = asyncio.run(through(mesh, name, new))
                took += time.perf_counter() - began
                own_s += time.process_time() - own
                after = cpu_seconds(pids)
                spent = {each: spent[each] + after[each] - before[each] for each in pids}
                tokens += sum(one.tokens for one in seen)
                messages += sum(len(one.times) for one in seen)
                mesh_rates.append(rate(seen))
    ratios = [mesh / alone for mesh, alone in zip(mesh_rates, bare_rates, strict=True)]
    return {
        "mesh_tokens_per_s": mesh_rates,
        "bare_tokens_per_s": bare_rates,
        "ratio": statistics.median(ratios),
        "messages_per_token": messages / tokens,
        "cpu_us_per_token": {each: round(1e6 * found / tokens) for each, found in spent.items()}
        | {"client": round(1e6 * own_s / tokens)},
        "seconds_in_mesh": took,
        "new_tokens": new,
    }


def drill(quick: bool) -> tuple[list[Bar], dict[str, Any]]:
    """A model of real size, and glm-tiny, whose tokens come hundreds of times as fast."""
    bars: list[Bar] = []
    details: dict[str, Any] = {}
    q05 = random_checkpoints.write(SHAPES["q05"], REPOSITORY / ".cache/engine")
    for name, model, new in (("q05", q05, 128), ("glm-tiny", tiny.MODEL, 400)):
        found = details[name] = measure(name, model, "int8", new, 1 if quick else 3)
        print(f"  {name}: {found}", flush=True)
        share = found["ratio"]
        bars.append(
            Bar(
                f"through the mesh, {name}, {STREAMS} streams: share of the bare engine",
                f"{100 * share:.1f} %",
                f">= {100 * WANTED:g} %",
                share >= WANTED,
            )
        )
    return bars, details
