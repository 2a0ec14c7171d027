"""`make clouds-smoke`: clouds on free ports, asked, hurt and judged without a person. Leaves nothing running."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from services.mesh import start
from services.mesh.clouds import asking, present, shared_artifacts
from services.mesh.clouds.asking import Answer
from services.mesh.clouds.settings import CloudsSettings
from services.mesh.clouds.state import CloudsState, CloudState
from services.mesh.local import CannotStart
from services.mesh.rundir import RunDirectory
from services.mesh.state import MeshState, ProcessState

WORKERS = "sparse-inference"
POLL_S = 0.05
PATIENCE_S = 30.0


class Flaw(Exception):
    """A check that failed."""


def smoke(settings: CloudsSettings, console: Console) -> bool:
    """Whether clouds can be started, give the same tokens, stand in for each other and keep data where it belongs."""
    settings.clouds_dir.mkdir(parents=True, exist_ok=True)
    directory = RunDirectory(Path(tempfile.mkdtemp(prefix="smoke-", dir=settings.clouds_dir)))
    environment = {**os.environ, "AUTOGLM_CLOUDS_DIR": str(directory.root), "AUTOGLM_CLOUDS_FREE_PORTS": "true"}
    supervisor = start.start(directory, environment, dies_with_us=True, module="services.mesh.clouds")
    began = time.monotonic()
    problem = ""
    try:
        current = present.wait_up(directory, supervisor, settings.clouds_start_timeout_s, console)
        present.show(current, console)
        checks = [_door_asks, _same_tokens, _unknown_region, stand_in_and_residency]
        if settings.clouds_shared_artifacts:
            checks.insert(2, models_by_digest)
        for check in checks:
            console.print(f"ok  {check(current)}", highlight=False, soft_wrap=True)
    except (CannotStart, Flaw, asking.NoAnswer, OSError) as error:
        problem = str(error)
    finally:
        start.stop(directory, settings.drain_grace_s, lambda _: None)
        supervisor.wait()
    if problem:
        console.print(f"FAILED: {problem}", style="red", markup=False, soft_wrap=True)
        console.print(f"logs are kept below {directory.root}")
    else:
        shutil.rmtree(directory.root, ignore_errors=True)
        console.print(f"ok in {time.monotonic() - began:.1f} s", style="green")
    return not problem


def _door_asks(current: CloudsState) -> str:
    """Without a token every cloud refuses; with one of the issuer that they share, every cloud answers."""
    refused = {}
    for cloud in current.clouds:
        refused[cloud.name] = status = _models(cloud, {})
        if status not in (401, 403):
            raise Flaw(f"{cloud.name} answered {status} to a request without a token")
        status = _models(cloud, {"authorization": f"Bearer {asking.token(current.issuer)}"})
        if status != 200:
            raise Flaw(f"{cloud.name} answered {status} to a good token")
    said = ", ".join(f"{name} {status}" for name, status in refused.items())
    return f"without a token every door refuses ({said}); one issuer's token is good at all of them"


def _models(cloud: CloudState, headers: dict[str, str]) -> int:
    """The status of a small REST request."""
    request = urllib.request.Request(f"http://{mesh_of(cloud).addresses.ingress}/v1/models", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as refused:
        return refused.code


def models_by_digest(current: CloudsState) -> str:
    """A model pushed into the first cloud is fetched from the last by its digest, byte for byte."""
    first, last = current.clouds[0], current.clouds[-1]
    model = Path(mesh_of(first).model_dir)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="autoglm-pulled-") as folder:
        try:
            digest = shared_artifacts.push(current, first, model)
            size = shared_artifacts.pull(current, last, digest, Path(folder))
        except shared_artifacts.NotShared as error:
            raise Flaw(str(error)) from None
        for path in Path(folder).iterdir():
            if path.read_bytes() != (model if model.is_file() else model / path.name).read_bytes():
                raise Flaw(f"{path.name} came out of {last.name} with other bytes than went into {first.name}")
    took = time.monotonic() - began
    return f"{digest[:19]}…: {size / 1e6:.1f} MB pushed into {first.name}, fetched from {last.name} ({took:.1f} s)"


def _same_tokens(current: CloudsState) -> str:
    """Every cloud, pinned to itself, gives one token stream."""
    answers = {cloud.name: _ask(current, cloud, cloud.name) for cloud in current.clouds}
    if len({(answer.token_ids, answer.variant_digest) for answer in answers.values()}) != 1:
        raise Flaw(f"the clouds do not give the same tokens: {answers}")
    count = len(next(iter(answers.values())).token_ids)
    return f"answers from {', '.join(answers)}: {count} tokens, the same everywhere"


def _unknown_region(current: CloudsState) -> str:
    """A region that does not exist is refused, not ignored."""
    try:
        _ask(current, current.clouds[0], "atlantis")
    except asking.NoAnswer as refused:
        return f"an unknown region is refused ({refused})"
    raise Flaw("a request for a region that does not exist was answered")


def stand_in_and_residency(current: CloudsState) -> str:
    """One worker killed: its cloud's other requests are served by another cloud, pinned ones fail."""
    cloud = current.clouds[-1]
    victim = workers(cloud)[0]
    wanted = _ask(current, current.clouds[0], current.clouds[0].name)
    if victim.pid is None:
        raise Flaw(f"{cloud.name} has no worker to kill")
    os.kill(victim.pid, signal.SIGKILL)
    until(lambda: workers(cloud)[0].pid != victim.pid, f"{cloud.name} sees that its worker is gone")
    until(lambda: _serves(current, cloud), "another cloud stands in")  # from here on no request may fail
    began = time.monotonic()
    served, failed = 0, ""
    while workers(cloud)[0].phase != "ready" and time.monotonic() - began < PATIENCE_S:
        if not failed:
            failed = _pinned(current, cloud)
        if _ask(current, cloud).token_ids != wanted.token_ids:
            raise Flaw("another cloud gave other tokens")
        served += workers(cloud)[0].phase != "ready"
    if not served:
        raise Flaw(f"{cloud.name}'s worker was back before another cloud could stand in")
    if not failed:
        raise Flaw(f"a request pinned to {cloud.name} was answered while it had no worker")
    return f"{cloud.name}'s worker killed: {served} requests served by another cloud; pinned to it: {failed}"


def _serves(current: CloudsState, cloud: CloudState) -> bool:
    try:
        _ask(current, cloud)
    except asking.NoAnswer:
        return False
    return True


def _pinned(current: CloudsState, cloud: CloudState) -> str:
    """How a request pinned to the cloud fails; empty when it does not."""
    try:
        _ask(current, cloud, cloud.name)
    except asking.NoAnswer as refused:
        return str(refused)
    return ""


def _ask(current: CloudsState, cloud: CloudState, region: str = "") -> Answer:
    mesh = mesh_of(cloud)
    return asking.ask(mesh.addresses.ingress, mesh.model, asking.token(current.issuer), region)


def mesh_of(cloud: CloudState) -> MeshState:
    """The state of the cloud's own supervisor. Raises `Flaw` when it is not up."""
    mesh = cloud.mesh
    if mesh is None:
        raise Flaw(f"{cloud.name} is not up")
    return mesh


def workers(cloud: CloudState) -> list[ProcessState]:
    """The cloud's workers as its supervisor sees them."""
    return [process for process in mesh_of(cloud).processes if process.service == WORKERS]


def until(condition: Callable[[], bool], what: str, timeout_s: float = PATIENCE_S) -> float:
    """Seconds until `condition` holds. Raises `Flaw` with `what`."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > timeout_s:
            raise Flaw(f"{what}: not within {timeout_s:g} s")
        time.sleep(POLL_S)
    return time.monotonic() - began
