"""What ships: each image's contents, made from its Dockerfile without a container engine, and its service started.

The environment has exactly the dependency group that the Dockerfile names, the folder exactly the files that it copies.
The program runs as the image's user where the tests run as root; nothing it can reach may be written to but its volume.
Needs a package index; without one the tests are skipped, visibly. What this cannot show: that the base image has what
Debian's Python here has, and that Docker accepts the files.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.chassis.probe import is_serving
from tests.fakes.image import ROOT, Image, build

IMAGES = {
    "gateway": "service",
    "tokenizer": "service",
    "scheduler": "service",
    "cache": "service",
    "sparse_inference": "kernels",
}
HEALTH = {
    "gateway": "autoglm.gateway.v1.GatewayService",
    "tokenizer": "autoglm.tokenizer.v1.TokenizerService",
    "scheduler": "autoglm.scheduler.v1.SchedulerService",
    "cache": "autoglm.cache.v1.CacheService",
    "sparse_inference": "autoglm.sparse_inference.v1.SparseInferenceService",
}
NO_INDEX = re.compile(r"NewConnectionError|NameResolutionError|ConnectTimeout|ReadTimeout|ProxyError|unreachable")
READY_S = 60.0

pytestmark = pytest.mark.timeout(300)  # most of it is pip: a first run on a slow network takes minutes


def user_of(image_user: str) -> dict[str, object]:
    """How Popen becomes the image's user; nothing when we are not root and so already nobody special."""
    uid, gid = (int(part) for part in image_user.split(":"))
    return {"user": uid, "group": gid, "extra_groups": []} if os.geteuid() == 0 else {}


@pytest.fixture(scope="module")
def python() -> Path:
    """An interpreter of the images' version that the images' user may run (one below /root cannot be)."""
    for candidate in filter(
        None, (shutil.which("python3.11", path="/usr/local/bin:/usr/bin"), shutil.which("python3.11"))
    ):
        done = subprocess.run([candidate, "-c", ""], cwd="/", env={}, capture_output=True, **user_of("10001:10001"))  # type: ignore[call-overload]
        if done.returncode == 0:
            return Path(candidate)
    pytest.skip("no Python 3.11 here that another user may run")


@pytest.fixture(scope="module", params=list(IMAGES))
def image(request: pytest.FixtureRequest, python: Path) -> Iterator[Image]:
    """One service's image, read-only. Below /tmp, as the user of the image must be able to get there."""
    folder = Path(tempfile.mkdtemp(prefix="autoglm-image-"))
    folder.chmod(0o755)
    root = folder / "root"
    root.mkdir()
    try:
        dockerfile = ROOT / "deploy" / "images" / f"{IMAGES[request.param]}.Dockerfile"
        try:
            built = build(dockerfile, root, python, {"SERVICE": request.param})
        except AssertionError as error:
            if NO_INDEX.search(str(error)):
                pytest.skip("no package index can be reached")
            raise
        for path in root.rglob("*"):
            if not path.is_symlink():
                path.chmod(stat.S_IMODE(path.stat().st_mode) & ~0o222 | 0o444)
        yield built
    finally:
        for path in [root, *(path for path in root.rglob("*") if path.is_dir() and not path.is_symlink())]:
            path.chmod(0o755)
        shutil.rmtree(folder)


def tree(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*")}


def test_the_service_starts_from_the_image_alone_and_says_serving(image: Image, tmp_path: Path) -> None:
    """As the image's user, from a tree it cannot write to, it becomes ready, and SIGTERM ends it with status 0."""
    service = image.environment["AUTOGLM_SERVICE"]
    volume = image.root.parent / "volume"
    volume.mkdir()
    model = image.root.parent / "glm-tiny"
    shutil.copytree(ROOT / "models" / "glm-tiny", model)
    uid, gid = (int(part) for part in image.user.split(":"))
    assert uid != 0 and gid != 0
    if os.geteuid() == 0:
        os.chown(volume, uid, gid)
    environment = {
        key: value.replace("/opt/autoglm", str(image.root)).replace("/var/lib/autoglm", str(volume))
        for key, value in image.environment.items()
    }
    environment |= {
        "PATH": environment["PATH"].replace("${PATH}", "/usr/bin:/bin"),
        "AUTOGLM_BIND": "127.0.0.1",
        "AUTOGLM_GRPC_PORT": "0",
        "AUTOGLM_METRICS_PORT": "0",
        "AUTOGLM_REST_PORT": "0",
        "AUTOGLM_MODELS": f"glm-tiny={model}",
        "AUTOGLM_MODEL_DIR": str(model),
        "AUTOGLM_THREADS": "1",
        "AUTOGLM_KV_CAPACITY_MIB": "16",
    }
    before = tree(image.root)
    log = tmp_path / "log"
    with log.open("wb") as output:
        program = subprocess.Popen(
            [str(image.path(f"/opt/autoglm/venv/bin/{image.entrypoint[0]}")), *image.entrypoint[1:]],
            cwd=image.path(image.workdir),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            **user_of(image.user),  # type: ignore[call-overload]
        )
    try:
        port = wait_ready(program, log)
        assert is_serving(f"127.0.0.1:{port}", HEALTH[service])
        if os.geteuid() == 0:
            ids = re.search(r"^Uid:\s+(\d+)", Path(f"/proc/{program.pid}/status").read_text(), re.MULTILINE)
            assert ids is not None and int(ids[1]) == uid
        program.send_signal(signal.SIGTERM)
        assert program.wait(30) == 0, log.read_text()[-2000:]
    finally:
        if program.poll() is None:
            os.killpg(program.pid, signal.SIGKILL)
            program.wait()
    assert tree(image.root) == before


def wait_ready(program: subprocess.Popen[bytes], log: Path) -> int:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline and program.poll() is None:
        for line in log.read_text().splitlines():
            if line.startswith("{") and (entry := json.loads(line)).get("message") == "ready":
                return int(entry["grpc_port"])
        time.sleep(0.05)
    raise AssertionError(f"not ready, exit status {program.poll()}\n{log.read_text()[-4000:]}")


def test_it_holds_its_own_group_and_no_heavy_stranger(image: Image) -> None:
    """Serving needs no torch; tokenizer, cache, scheduler and gateway need no numpy either; nobody has pip."""
    service = image.environment["AUTOGLM_SERVICE"]
    assert set(image.groups) == {service}
    strangers = {"torch", "transformers", "onnxruntime", "pip", "pytest", "rich", "typer", "envoy"}
    if service != "sparse_inference":
        strangers |= {"numpy", "autoglm_kernels", "llguidance"}
    code = f"import importlib.util; print([n for n in {sorted(strangers)} if importlib.util.find_spec(n)])"
    python = image.path("/opt/autoglm/venv/bin/python")
    found = subprocess.run([python, "-c", code], cwd="/", env={}, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_it_holds_no_other_service(image: Image) -> None:
    """Chassis and its own folder, and no tests, models or policy."""
    service = image.environment["AUTOGLM_SERVICE"]
    app = image.path("/opt/autoglm/app")
    folders = {path.name for path in (app / "services").iterdir() if path.is_dir()}
    assert folders - {"__pycache__"} == {"chassis", service}
    assert {path.name for path in app.iterdir()} == {"services", "engine"}
    assert image.labels["org.opencontainers.image.title"].endswith(service)
    assert re.fullmatch(r"python:3\.11\.\d+-slim-bookworm", image.base), "the base is pinned by tag"
