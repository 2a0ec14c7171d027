"""The whole mesh as people run it: real services, real Envoy, the repository's own policy and model.

One mesh serves the tests of this file; each leaves it as it found it.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from services.mesh import demo, ports, state
from services.mesh.rundir import RunDirectory
from services.mesh.settings import FIXED_PORTS
from services.mesh.state import MeshState
from tests.fakes.processes import is_alive

REPOSITORY = Path(__file__).resolve().parents[2]
DEADLINE_S = 20.0
EVERYBODY = ("client", "envoy", "gateway", "tokenizer", "scheduler", "sparse-inference", "cache")

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(not (REPOSITORY / "models/glm-tiny/model.safetensors").exists(), reason="the model is not here"),
]


@dataclass(frozen=True)
class Mesh:
    """A mesh that is up, and the means to command it."""

    environment: dict[str, str]
    directory: RunDirectory
    policy: Path
    first_output: str

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "services.mesh", *words],
            cwd=REPOSITORY, env=self.environment, capture_output=True, text=True, timeout=90, check=False,
        )  # fmt: skip

    def state(self) -> MeshState:
        current = state.read(self.directory.state)
        assert current is not None
        return current

    def until(self, claim: Callable[[MeshState], bool], within_s: float = DEADLINE_S) -> MeshState:
        deadline = time.monotonic() + within_s
        while not claim(current := self.state()):
            assert time.monotonic() < deadline, current.model_dump_json(indent=1)
            time.sleep(0.02)
        return current


def environment(root: Path, policy: Path) -> dict[str, str]:
    supply = ports.free("127.0.0.1")
    return {
        **os.environ,
        **{f"AUTOGLM_{name.upper()}": str(next(supply)) for name, _ in FIXED_PORTS},
        "AUTOGLM_RUN_DIR": str(root / "run"),
        "AUTOGLM_POLICY_DIR": str(policy),
    }


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    root = tmp_path_factory.mktemp("mesh")
    policy = root / "istio"
    shutil.copytree(REPOSITORY / "istio/base", policy)
    made = Mesh(environment(root, policy), RunDirectory(root / "run"), policy, "")
    try:
        started = made.command("run")
        assert started.returncode == 0, started.stdout + started.stderr
        yield Mesh(made.environment, made.directory, policy, started.stdout)
    finally:
        made.command("stop")


def test_the_first_run_shows_an_answer_and_every_service_in_one_trace(mesh: Mesh) -> None:
    """`make run`: text, token counts, a span tree with everybody in it, and what to try next."""
    shown = mesh.first_output
    assert "no span came from" not in shown and "parent not seen" not in shown
    for name in EVERYBODY:
        assert f"─ {name}" in shown or f"\n{name} chat" in shown, f"{name} is missing from\n{shown}"
    for word in ("tokens after", "curl -N", "OpenAI(", "autoglm", "make stop"):
        assert word in shown


def test_a_second_run_says_that_the_mesh_is_up_and_asks_again(mesh: Mesh) -> None:
    """Nothing is started twice: the supervisor stays the same."""
    pid = mesh.state().pid
    again = mesh.command("run")
    assert again.returncode == 0, again.stdout
    assert "already up" in again.stdout and "tokens after" in again.stdout
    assert mesh.state().pid == pid


def test_rest_and_grpc_share_one_door(mesh: Mesh) -> None:
    """The ingress answers OpenAI REST on the port that gRPC clients use."""
    connection = http.client.HTTPConnection(mesh.state().addresses.ingress, timeout=10)
    connection.request("GET", "/v1/models")
    response = connection.getresponse()
    assert response.status == 200
    assert [item["id"] for item in json.loads(response.read())["data"]] == ["glm-tiny"]


def test_status_tells_processes_endpoints_weights_and_fallbacks(mesh: Mesh) -> None:
    """Everything in one JSON object, and in tables for people."""
    status: dict[str, Any] = json.loads(mesh.command("status", "--json").stdout)
    assert status["phase"] == "up" and status["unanswered"] == []
    assert {item["phase"] for item in status["processes"]} == {"ready"}
    workers = status["clusters"]["gateway~outbound|50051|v1|sparse-inference.autoglm.svc.cluster.local"]
    assert len(workers) == 2
    weights = {item["destination"]: item["weight"] for item in status["policy"]["weights"]}
    assert weights == {"sparse-inference/v1": 100, "sparse-inference/canary": 0}
    assert isinstance(status["fallbacks"], list)
    table = mesh.command("status").stdout
    assert "sparse-inference-v1-1" in table and "100 %" in table


def test_certificates_are_shown_and_renewed_on_demand(mesh: Mesh) -> None:
    """`status` lists each account's certificate; `rotate` returns once Envoy shows new ones, and requests go on."""
    before = json.loads(mesh.command("status", "--json").stdout)["identities"]
    assert {item["account"] for item in before} == {"ingress", "gateway", *EVERYBODY} - {"client", "envoy"}
    assert {item["is_loaded"] for item in before} == {True}
    assert "spiffe://cluster.local/ns/autoglm/sa/cache" in mesh.command("status").stdout
    renewed = mesh.command("rotate")
    assert renewed.returncode == 0, renewed.stdout + renewed.stderr
    after = json.loads(mesh.command("status", "--json").stdout)["identities"]
    assert not {item["serial"] for item in before} & {item["serial"] for item in after}
    assert {item["is_loaded"] for item in after} == {True}
    assert all(item["serial"] in renewed.stdout for item in after)
    assert mesh.command("run").returncode == 0


def test_a_good_edit_is_served(mesh: Mesh) -> None:
    """A changed weight reaches Envoy, whose acceptance is read back; undoing it too."""
    routes = mesh.policy / "routes.yaml"
    before, version = routes.read_text(), mesh.state().policy.version
    routes.write_text(before.replace("weight: 100", "weight: 90").replace("weight: 0", "weight: 10"))
    try:
        current = mesh.until(lambda now: now.policy.version != version)
        assert [item.weight for item in current.policy.weights] == [90, 10]
        (warning,) = current.policy.warnings
        assert "10 % of the requests go to subset canary" in warning and warning in mesh.command("status").stdout
        checked = mesh.command("validate", str(mesh.policy))
        assert checked.returncode == 0 and "subset canary" in checked.stdout
    finally:
        routes.write_text(before)
    assert mesh.until(lambda now: now.policy.version == version).policy.warnings == []


def test_a_broken_edit_is_refused_with_all_reasons_and_the_old_policy_stays(mesh: Mesh) -> None:
    """Two mistakes, two reasons, in the state and in the log; requests go on being answered."""
    routes = mesh.policy / "routes.yaml"
    before, version = routes.read_text(), mesh.state().policy.version
    routes.write_text(before.replace("subset: canary", "subset: canari").replace("weight: 100", "weight: 70"))
    try:
        refused = mesh.until(lambda now: bool(now.policy.refused)).policy
        assert refused.version == version
        assert any("canari" in reason for reason in refused.refused)
        assert any("70" in reason for reason in refused.refused)
        assert "canari" in mesh.directory.log("mesh").read_text()
        assert mesh.command("validate", str(mesh.policy)).returncode == 1
        asked = ask(mesh)
        assert asked.text
    finally:
        routes.write_text(before)
    mesh.until(lambda now: not now.policy.refused)


def test_a_killed_worker_comes_back_while_the_other_serves(mesh: Mesh) -> None:
    """kill -9: its endpoint goes, requests use the other worker, and it returns with a restart on its record."""
    victim = next(item for item in mesh.state().processes if item.name == "sparse-inference-v1-0")
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    mesh.until(lambda now: process(now, victim.name).phase != "ready" or process(now, victim.name).pid != victim.pid)
    assert ask(mesh).text
    back = mesh.until(lambda now: process(now, victim.name).restarts > victim.restarts and all_ready(now))
    assert process(back, victim.name).last_exit == "killed by SIGKILL"
    assert process(back, victim.name).pid != victim.pid


def test_decisions_of_a_real_run_replay_and_hold_no_prompt(mesh: Mesh) -> None:
    """The log is there without asking for it; the replay finds no difference, across a restart of the scheduler too."""
    log = mesh.directory.root / "decisions" / "decisions.jsonl"

    def decisions() -> int:
        return log.read_bytes().count(b'"kind":"decision"')

    def placed_again() -> bool:
        ask(mesh)
        return decisions() > before

    ask(mesh)
    before, victim = decisions(), process(mesh.state(), "scheduler")
    assert before > 0 and victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    mesh.until(lambda now: process(now, "scheduler").restarts > victim.restarts and all_ready(now))
    mesh.until(lambda _: placed_again())
    least = decisions()
    done = subprocess.run(
        [sys.executable, "-m", "services.scheduler.replay", str(log)],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    identical = re.search(r"identical +(\d+)\n", done.stdout)
    assert identical and least <= int(identical[1]) <= decisions(), done.stdout  # the last may have come late
    assert b"release the lock" not in log.read_bytes()


def test_a_trace_is_whole_without_the_picker(mesh: Mesh) -> None:
    """The scheduler hangs: the answer comes, its trace is one tree with Envoy's question in it and nobody's answer."""
    victim = process(mesh.state(), "scheduler")
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGSTOP)
    try:
        answer = ask(mesh)
        others = [name for name in EVERYBODY if name != "scheduler"]
        tree, missing = demo.whole_trace(mesh.state().addresses.traces, answer.trace_id, others)
        assert answer.text and not missing and tree.has_root and not tree.orphans
        assert not any(service.startswith("scheduler") for service in tree.services)
    finally:
        os.kill(victim.pid, signal.SIGCONT)
    mesh.until(all_ready)


def test_a_lost_access_log_is_opened_again(mesh: Mesh) -> None:
    """Envoy missed the order to open a new file after a rotation: it is told again, so the old one stays bounded."""
    path = mesh.directory.envoy / "access.log"
    path.replace(path.with_name("access.log.1"))
    mesh.until(lambda _: path.exists())


def test_one_trace_can_be_shown_again(mesh: Mesh) -> None:
    """`trace ID` and `trace last` draw what the sink keeps; an unknown id is an error."""
    answer = ask(mesh)
    tree, missing = demo.whole_trace(mesh.state().addresses.traces, answer.trace_id, EVERYBODY)
    assert not missing and not tree.orphans
    shown = mesh.command("trace", answer.trace_id)
    assert shown.returncode == 0 and answer.trace_id in shown.stdout
    assert mesh.command("trace", "last").returncode == 0
    assert mesh.command("trace", "0" * 32).returncode == 1


def test_a_taken_port_is_named_with_the_setting_that_moves_it(mesh: Mesh, tmp_path: Path) -> None:
    """A second mesh on the same ports is told which, and what to type instead."""
    other = Mesh({**mesh.environment, "AUTOGLM_RUN_DIR": str(tmp_path)}, RunDirectory(tmp_path), mesh.policy, "")
    refused = other.command("run")
    assert refused.returncode == 1
    assert mesh.environment["AUTOGLM_INGRESS_PORT"] in refused.stdout and "AUTOGLM_INGRESS_PORT=" in refused.stdout
    assert other.directory.holder() is None


@pytest.mark.parametrize("word", ["run", "smoke", "status", "stop"])
def test_a_run_directory_that_cannot_be_used_is_named(tmp_path: Path, word: str) -> None:
    """One line with the way out, no traceback."""
    (tmp_path / "run").write_text("a file")
    lone = Mesh(environment(tmp_path, REPOSITORY / "istio/base"), RunDirectory(tmp_path / "run"), tmp_path, "")
    refused = lone.command(word)
    assert refused.returncode == 1
    assert "AUTOGLM_RUN_DIR names another" in refused.stdout and "Traceback" not in refused.stdout + refused.stderr


def test_what_cannot_start_is_shown_with_its_last_words(tmp_path: Path) -> None:
    """One broken service: `run` names it with the end of its log, stops the others, and leaves with status 1."""
    topology = tmp_path / "mesh.yaml"
    text = re.sub(r"services\.[a-z_]+", "tests.fakes.member", (REPOSITORY / "deploy/local/mesh.yaml").read_text())
    topology.write_text(text.replace("tests.fakes.member", "tests.fakes.does_not_exist", 1))
    given = environment(tmp_path, REPOSITORY / "istio/base") | {"AUTOGLM_TOPOLOGY": str(topology)}
    lone = Mesh(given, RunDirectory(tmp_path / "run"), tmp_path, "")
    refused = lone.command("run")
    assert refused.returncode == 1
    assert "tokenizer did not start" in refused.stdout
    assert "No module named tests.fakes.does_not_exist" in refused.stdout
    assert lone.state().phase == "failed" or lone.directory.holder() is not None
    deadline = time.monotonic() + DEADLINE_S
    while lone.directory.holder() is not None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert all(item.pid is None for item in lone.state().processes)


def test_a_broken_policy_stops_the_start_with_every_reason(tmp_path: Path) -> None:
    """Nothing is started under a policy that cannot be served."""
    policy = tmp_path / "istio"
    shutil.copytree(REPOSITORY / "istio/base", policy)
    (policy / "broken.yaml").write_text("kind: Nothing\n---\nkind: VirtualService\nspec: {hots: []}\n")
    refused = Mesh(environment(tmp_path, policy), RunDirectory(tmp_path / "run"), policy, "").command("run")
    assert refused.returncode == 1
    assert "Nothing" in refused.stdout and "hots" in refused.stdout
    assert RunDirectory(tmp_path / "run").holder() is None


def test_smoke_passes_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """`make smoke`: a mesh of its own, one judged request, exit status 0, no process and no file left."""
    lone = Mesh(environment(tmp_path, REPOSITORY / "istio/base"), RunDirectory(tmp_path / "run"), tmp_path, "")
    done = lone.command("smoke")
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((tmp_path / "run").iterdir()) == []


def test_stop_is_complete_and_may_be_repeated(tmp_path: Path) -> None:
    """After `stop` no process of the mesh lives; a second `stop` says so; a kill -9 of the supervisor does the same."""
    lone = Mesh(environment(tmp_path, REPOSITORY / "istio/base"), RunDirectory(tmp_path / "run"), tmp_path, "")
    try:
        for end in (lambda: lone.command("stop"), lambda: os.kill(lone.state().pid, signal.SIGKILL)):
            assert lone.command("run").returncode == 0
            pids = [item.pid for item in lone.state().processes]
            end()
            deadline = time.monotonic() + DEADLINE_S
            while any(is_alive(pid) for pid in pids if pid is not None):
                assert time.monotonic() < deadline
                time.sleep(0.02)
    finally:
        lone.command("stop")
    assert "nothing was running" in lone.command("stop").stdout
    assert lone.command("status").returncode == 3


def ask(mesh: Mesh) -> demo.Answer:
    addresses = mesh.state().addresses
    return demo.ask(addresses.ingress, addresses.otlp, "glm-tiny", lambda _: None)


def process(now: MeshState, name: str) -> state.ProcessState:
    return next(item for item in now.processes if item.name == name)


def all_ready(now: MeshState) -> bool:
    return all(item.phase == "ready" for item in now.processes)
