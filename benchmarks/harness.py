"""A private mesh to measure or to hurt: on free ports, with its own copy of the policy, gone when the block ends.

Used by the drills in this folder and by tests/mesh. Everything is observed from outside: the supervisor's state file,
the metrics pages and Envoy's admin page.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import autoglm
from prometheus_client.parser import text_string_to_metric_families

from services.mesh import ports, start
from services.mesh.rundir import RunDirectory
from services.mesh.settings import FIXED_PORTS
from services.mesh.state import MeshState, ProcessState, read

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_name("results")
POLL_S = 0.02
MODEL = "glm-tiny"


class Mesh:
    """A running mesh. Make it with `running`."""

    def __init__(self, directory: RunDirectory, policy: Path) -> None:
        self.directory, self.policy = directory, policy

    @property
    def state(self) -> MeshState:
        current = read(self.directory.state)
        assert current is not None
        return current

    @property
    def ingress(self) -> str:
        return self.state.addresses.ingress

    def processes(self, service: str) -> list[ProcessState]:
        return [process for process in self.state.processes if process.service == service]

    def kill(self, process: ProcessState) -> None:
        """kill -9, by pid."""
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)

    def metric(self, process: ProcessState, name: str, **labels: str) -> float:
        """Sum of the samples of `name` whose labels include these; 0 when the page or the metric is not there."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{process.metrics_port}/metrics", timeout=5) as page:
                text = page.read().decode()
        except OSError:
            return 0.0
        return _sum(text, name, labels)

    def envoy_stat(self, suffix: str) -> int:
        """Sum over Envoy's counters whose name ends with `suffix`."""
        with urllib.request.urlopen(f"http://{self.state.addresses.admin}/stats?format=json", timeout=5) as page:
            stats = json.load(page)["stats"]
        return sum(int(s["value"]) for s in stats if s.get("name", "").endswith(suffix) and "value" in s)

    def trace(self, trace_id: str) -> list[dict[str, Any]]:
        """The spans of one trace, as the sink has them now."""
        with urllib.request.urlopen(f"http://{self.state.addresses.traces}/traces/{trace_id}", timeout=5) as page:
            spans: list[dict[str, Any]] = json.load(page)["spans"]
        return spans

    def edit(self, file: str, change: Callable[[str], str]) -> None:
        """Rewrites one policy file as an editor would: whole, by rename."""
        path = self.policy / file
        fresh = path.with_suffix(".edited")
        fresh.write_text(change(path.read_text()))
        os.rename(fresh, path)

    async def until(self, condition: Callable[[], bool], what: str, timeout_s: float = 20.0) -> float:
        """Seconds until `condition` holds; looks again and again. Raises TimeoutError with `what`."""
        began = time.monotonic()
        while not await asyncio.to_thread(condition):
            if time.monotonic() - began > timeout_s:
                raise TimeoutError(f"{what}: not within {timeout_s:g} s")
            await asyncio.sleep(POLL_S)
        return time.monotonic() - began


@contextmanager
def running(replicas: str = "", timeout_s: float = 90.0, **environment: str) -> Iterator[Mesh]:
    """Starts a mesh with a copy of istio/base and stops it; its logs are kept when the block fails."""
    root = Path(tempfile.mkdtemp(prefix="autoglm-mesh-"))
    directory, policy = RunDirectory(root), root / "policy"
    shutil.copytree(REPOSITORY / "istio/base", policy)
    supply = ports.free("127.0.0.1")
    chosen = {f"AUTOGLM_{name.upper()}": str(next(supply)) for name, _ in FIXED_PORTS}
    chosen |= {"AUTOGLM_RUN_DIR": str(root), "AUTOGLM_POLICY_DIR": str(policy), "AUTOGLM_REPLICAS": replicas}
    with supervised(root, directory, chosen | environment, drain_s=5.0) as supervisor:
        start.wait_up(directory, supervisor, timeout_s, lambda _: None)
        yield Mesh(directory, policy)


@contextmanager
def supervised(
    root: Path, directory: RunDirectory, settings: dict[str, str], drain_s: float, module: str = "services.mesh"
) -> Iterator[subprocess.Popen[bytes]]:
    """Starts a supervisor with these settings only and stops it; all of `root` is kept when the block fails."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("AUTOGLM_")}
    path = {"PYTHONPATH": os.pathsep.join((str(REPOSITORY), str(REPOSITORY / "sdk")))}
    supervisor = start.start(directory, inherited | path | settings, dies_with_us=True, module=module)
    try:
        yield supervisor
    except BaseException:
        print(f"logs are kept in {root}", file=sys.stderr)
        raise
    else:
        _stop(directory, supervisor, drain_s)
        shutil.rmtree(root, ignore_errors=True)
    finally:
        _stop(directory, supervisor, drain_s)


def _stop(directory: RunDirectory, supervisor: subprocess.Popen[bytes], drain_s: float) -> None:
    if supervisor.poll() is None:
        start.stop(directory, drain_s, lambda _: None)
        supervisor.wait()


@dataclass
class Load:
    """What became of the requests of one load."""

    outcomes: Counter[str] = field(default_factory=Counter)
    ttft_ms: list[float] = field(default_factory=list)
    took_s: float = 0.0
    tokens: int = 0
    errors: list[str] = field(default_factory=list)

    @property
    def failures(self) -> int:
        return sum(count for outcome, count in self.outcomes.items() if outcome != "ok")


@asynccontextmanager
async def client(mesh: Mesh) -> AsyncIterator[autoglm.AsyncClient]:
    """An SDK client on the mesh's ingress."""
    async with autoglm.AsyncClient(mesh.ingress) as opened:
        yield opened


async def load(
    mesh: Mesh, requests: int, concurrency: int, max_tokens: int = 24, on_done: Callable[[int], None] = lambda n: None
) -> Load:
    """`requests` streamed generations, `concurrency` at a time; `on_done(n)` after the n-th end."""
    result, began = Load(), time.monotonic()
    numbers = iter(range(requests))
    ended = 0

    async def work(caller: autoglm.AsyncClient) -> None:
        nonlocal ended
        for number in numbers:
            await _one(caller, number, max_tokens, result)
            ended += 1
            on_done(ended)

    async with client(mesh) as caller:
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(work(caller))
    result.took_s = time.monotonic() - began
    return result


async def _one(caller: autoglm.AsyncClient, number: int, max_tokens: int, result: Load) -> None:
    began, first = time.monotonic(), True
    prompt = f"# request {number}\ndef function_{number}(value):\n"
    try:
        stream = caller.stream(
            prompt, model=MODEL, max_tokens=max_tokens, temperature=0.8, seed=number, ignore_eos=True, timeout=60
        )
        async with stream as events:
            async for event in events:
                if first and isinstance(event, autoglm.Delta):
                    result.ttft_ms.append((time.monotonic() - began) * 1000)
                    first = False
                if isinstance(event, autoglm.Done) and event.usage is not None:
                    result.tokens += event.usage.completion_tokens
        result.outcomes["ok"] += 1
    except autoglm.AutoglmError as error:
        result.outcomes[type(error).__name__] += 1
        result.errors.append(f"{number}: {type(error).__name__}: {error}"[:300])


def _sum(text: str, name: str, labels: dict[str, str]) -> float:
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and all(sample.labels.get(key) == value for key, value in labels.items())
    )


@dataclass(frozen=True)
class Bar:
    """One claim: what was measured, and what was wanted."""

    name: str
    value: str
    target: str
    is_met: bool


def report(name: str, bars: list[Bar], details: dict[str, Any], command: str = "") -> None:
    """Prints one line per bar and writes benchmarks/results/<name>.json with commit, machine and command."""
    for bar in bars:
        print(f"{bar.name}  {bar.value}  {bar.target}  {'ok' if bar.is_met else 'missed'}")
    RESULTS.mkdir(exist_ok=True)
    record = {
        "name": name,
        "commit": commit(),
        "command": command or f"python -m benchmarks.mesh {name}",
        "machine": machine(),
        "unix_s": int(time.time()),
        "bars": [vars(bar) for bar in bars],
        **details,
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    """numpy's numbers as Python's own."""
    return value.item()


def commit() -> str:
    """What the working tree was made from."""
    command = ["git", "rev-parse", "HEAD"]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False).stdout.strip()


def machine() -> dict[str, Any]:
    """Where a result was measured."""
    return {"processor": _processor(), "cores": os.cpu_count(), "system": platform.platform()}


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
