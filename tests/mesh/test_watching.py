"""`autoglm trace` and `autoglm top` as commands, beside a real mesh."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import autoglm
import pytest
from autoglm.cli import meshes

from benchmarks import harness
from benchmarks.harness import MODEL, Mesh

pytestmark = pytest.mark.timeout(120)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with harness.running() as started:
        yield started


def command(*arguments: str, directory: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("AUTOGLM_")}
    environment["AUTOGLM_RUN_DIR"] = str(directory)
    return subprocess.run(
        [sys.executable, "-m", "autoglm.cli", *arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


def seen(mesh: Mesh, trace_id: str) -> dict[str, Any]:
    """What the sink has of a trace by now."""
    try:
        return dict(json.loads(meshes.get(mesh.state.addresses.traces, f"/traces/{trace_id}")))
    except LookupError:
        return {}


async def test_one_request_is_shown_by_either_of_its_ids(mesh: Mesh) -> None:
    """By the request id a client was told, by the trace id, and as `last`: the same tree, from door to worker."""
    async with autoglm.AsyncClient(mesh.ingress) as client:
        done = await client.generate("import os\n", model=MODEL, max_tokens=8, ignore_eos=True)

    def has_come() -> bool:
        spans = seen(mesh, done.trace_id).get("spans", [])
        ids = {span["span_id"] for span in spans}
        return {"gateway", "sparse-inference"} <= {span["service"] for span in spans} and all(
            not span["parent_id"] or span["parent_id"] in ids for span in spans
        )

    await mesh.until(has_come, "the tree")
    shown = {
        which: command("trace", which, directory=mesh.directory.root).stdout
        for which in (done.request_id, done.trace_id, "last")
    }
    assert all(f"trace {done.trace_id}" in text and "sparse-inference-v1" in text for text in shown.values())
    text = shown[done.request_id]
    assert text.startswith("envoy-ingress") and "schedule" in text and "out=8" in text
    told = json.loads(command("trace", done.trace_id, "--json", directory=mesh.directory.root).stdout)
    assert told["trace_id"] == done.trace_id and len(told["spans"]) > 10 and told["logs"] == []


async def test_a_failed_request_is_shown_with_what_envoy_logged(mesh: Mesh) -> None:
    """The status and Envoy's details are below the tree; asked at the sink's address instead of a run directory."""
    with autoglm.Client(mesh.ingress) as client, pytest.raises(autoglm.NotFoundError) as caught:
        client.generate("x", model="nobody", max_tokens=1)
    failed = caught.value

    def has_come() -> bool:
        answer = seen(mesh, failed.trace_id)
        return bool(answer.get("logs")) and any(span["service"] == "gateway" for span in answer["spans"])

    await mesh.until(has_come, "the log record")
    arguments = ("trace", failed.request_id, "--traces", mesh.state.addresses.traces)
    ended = command(*arguments, directory=Path("/nowhere"))
    assert "log of envoy-ingress" in ended.stdout
    assert "grpc_status=NotFound" in ended.stdout and "details=via_upstream" in ended.stdout


def test_an_unknown_id_says_what_an_id_is(mesh: Mesh) -> None:
    """Exit status 4 and a line that helps; without any mesh 3, and how to start one."""
    unknown = command("trace", "f" * 32, directory=mesh.directory.root)
    assert unknown.returncode == 4 and "32 hexadecimal digits" in unknown.stderr
    nobody = command("trace", "last", directory=mesh.directory.root / "nowhere")
    assert nobody.returncode == 3 and "make run" in nobody.stderr


def test_top_tells_figures_of_every_cloud_and_worker(mesh: Mesh) -> None:
    """Under load: tokens a second, workers with what they run, weights, and latencies; as JSON, one line per cloud."""
    with autoglm.Client(mesh.ingress) as client:
        for number in range(3):
            client.generate(f"import os  # {number}\n", model=MODEL, max_tokens=16, ignore_eos=True)
        root = mesh.directory.root
        ended = command("top", "--json", "--interval", "0.2", "--run-dir", str(root), directory=Path("/nowhere"))
    (line,) = ended.stdout.splitlines()
    told: dict[str, Any] = json.loads(line)
    assert (told["name"], told["phase"], told["unanswered"]) == ("local", "up", [])
    assert {worker["name"] for worker in told["workers"]} == {p.name for p in mesh.processes("sparse-inference")}
    assert {(w["model"], w["version"], w["sparsity"]) for w in told["workers"]} == {(MODEL, "v1", "dense")}
    assert told["first_token_p99_s"] > 0 and told["between_tokens_p50_s"] > 0
    assert told["policy"] == mesh.state.policy.version
    assert sum(weight["weight"] for weight in told["weights"]) == 100
