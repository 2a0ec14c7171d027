"""Where a program's calls go, and by what address others reach it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from services.chassis.probe import is_serving, main
from services.chassis.settings import ServiceSettings
from services.sparse_inference.lease import reached_at
from services.sparse_inference.settings import WorkerSettings
from tests.fakes.processes import REPOSITORY, running


def test_calls_go_through_the_outbound_listener_or_by_name() -> None:
    """With a mesh address everything goes there; without one each service is dialled by its Kubernetes name."""
    assert ServiceSettings(mesh_address="127.0.0.1:15001").target("cache") == "127.0.0.1:15001"
    by_name = ServiceSettings(mesh_address="", namespace="other", service_port=7)
    assert by_name.target("cache") == "dns:///cache.other.svc.cluster.local:7"


def test_a_worker_that_listens_everywhere_says_a_real_address() -> None:
    """0.0.0.0 is nobody's address: the worker names the one it has on the way to Envoy. What is set wins."""
    everywhere = WorkerSettings(bind="0.0.0.0", mesh_address="127.0.0.9:15001")
    assert reached_at(everywhere, 50051) == "127.0.0.1:50051"
    assert reached_at(WorkerSettings(bind="127.0.0.3"), 50051) == "127.0.0.3:50051"
    assert reached_at(WorkerSettings(bind="0.0.0.0", advertise="10.0.0.7:1"), 50051) == "10.0.0.7:1"


def test_the_probe_tells_serving_from_the_rest() -> None:
    """0 for a service that serves and for a process that lives; 1 for an unknown service and for nobody."""
    with running("services.cache", AUTOGLM_CACHE_DIRECTORY="") as cache:
        assert main(["autoglm.cache.v1.CacheService", cache.address]) == 0
        assert main(["", cache.address]) == 0
        assert main(["autoglm.cache.v1.NoService", cache.address]) == 1
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        assert not is_serving(f"127.0.0.1:{deaf.getsockname()[1]}", timeout_s=0.3)


def test_an_image_starts_the_program_it_is_named_after_and_only_a_known_name() -> None:
    """`python -m services` runs the folder that AUTOGLM_SERVICE says; anything else ends with status 2."""
    with running("services", AUTOGLM_SERVICE="cache", AUTOGLM_CACHE_DIRECTORY="") as cache:
        assert is_serving(cache.address, "autoglm.cache.v1.CacheService")
        line = cache.wait_for("ready")
        assert (line["service"], line["instance"]) == ("cache", socket.gethostname()[:64])
        assert cache.terminate() == 0
    with running("services", ready=None, AUTOGLM_SERVICE="../cache") as wrong:
        assert wrong.wait(20) == 2


def test_sigterm_before_the_program_is_ready_ends_it(tmp_path: Path) -> None:
    """A worker that still reads its model is ended at once, with the status of an ended process, even as process 1."""
    model = tmp_path / "model"
    model.mkdir()
    os.mkfifo(model / "weights.fifo")
    code = (
        "import os, runpy, services.__main__ as m\n"
        f"def load(name, **_): open({str(model / 'weights.fifo')!r})\n"  # waits for ever, as a slow disk would
        "m.runpy.run_module = load\n"
        "print('about to load', flush=True)\n"
        "m.main()\n"
    )
    program = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env={**os.environ, "AUTOGLM_SERVICE": "sparse_inference"},
        stdout=subprocess.PIPE,
    )
    try:
        assert program.stdout is not None and program.stdout.readline() == b"about to load\n"
        waiting = Path(f"/proc/{program.pid}/status")
        while not _handles(waiting.read_text(), signal.SIGTERM):
            assert program.poll() is None
        program.send_signal(signal.SIGTERM)
        assert program.wait(10) == 128 + signal.SIGTERM
    finally:
        program.kill()
        program.wait()
        program.stdout.close()


def _handles(status: str, number: signal.Signals) -> bool:
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)
