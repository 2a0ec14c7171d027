"""One mesh per run directory, ports that say who they are, and a store that forgets in time."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from autoglm.cli.spans import Span

from services.mesh import ports
from services.mesh.demo import Answer
from services.mesh.local import LocalMesh
from services.mesh.rundir import AlreadyRunning, RunDirectory, write_atomically
from services.mesh.settings import MeshSettings
from services.mesh.sink.store import Bounds, TraceStore
from services.mesh.smoke import flaws


def test_a_run_directory_has_one_holder_and_says_who(tmp_path: Path) -> None:
    """The second supervisor is refused, and readers learn the pid of the first."""
    directory = RunDirectory(tmp_path)
    assert directory.holder() is None
    with directory.hold():
        assert RunDirectory(tmp_path).holder() == os.getpid()
        with pytest.raises(AlreadyRunning), RunDirectory(tmp_path).hold():
            pass
    assert directory.holder() is None


def test_a_killed_holder_leaves_nothing_to_clean_up(tmp_path: Path) -> None:
    """No stale pid file: the lock dies with its process."""
    code = "import sys,time; from pathlib import Path; from services.mesh.rundir import RunDirectory\n"
    code += "with RunDirectory(Path(sys.argv[1])).hold(): print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        assert RunDirectory(tmp_path).holder() == holder.pid
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert RunDirectory(tmp_path).holder() is None


def test_atomic_writes_leave_no_temporary_file(tmp_path: Path) -> None:
    """A watcher of the folder sees the file and nothing else."""
    write_atomically(tmp_path / "sub" / "a.json", "1")
    write_atomically(tmp_path / "sub" / "a.json", "2")
    assert [(path.name, path.read_text()) for path in (tmp_path / "sub").iterdir()] == [("a.json", "2")]


def test_a_taken_port_is_named_with_the_setting_that_moves_it() -> None:
    """The message says which port, what it is for, and what to type instead."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        settings = MeshSettings(ingress_port=number, admin_port=0, otlp_port=0)
        (line,) = ports.conflicts(settings)
    assert str(number) in line and "clients connect here" in line and "AUTOGLM_INGRESS_PORT=" in line


def test_one_port_for_two_purposes_is_a_conflict() -> None:
    """Both settings are named."""
    free = next(ports.free("127.0.0.1"))
    settings = MeshSettings(ingress_port=free, admin_port=free, otlp_port=0)
    (line,) = ports.conflicts(settings)
    assert "AUTOGLM_INGRESS_PORT" in line and "AUTOGLM_ADMIN_PORT" in line


def test_no_service_is_given_a_port_that_the_settings_promise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The door, the trace sink and the other clouds listen later than ports are drawn; theirs are not drawn again."""
    monkeypatch.setattr(ports.random, "sample", lambda among, _: list(among))  # the first ports come up first
    supply = ports.free("127.0.0.1")
    names = ("ingress_port", "admin_port", "otlp_port", "federation_port", "eastwest_port")
    promised = {name: next(supply) for name in names}
    mesh = LocalMesh(MeshSettings(run_dir=tmp_path, **promised))
    drawn = [port for item in mesh.instances.values() for port in item.ports.values()]
    assert drawn and not {*drawn} & {*promised.values()}


def span(trace: int, number: int, text: str = "") -> Span:
    return Span(f"{trace:032x}", f"{number:016x}", "", "s", "n", number, number + 1, attributes={"text": text})


def test_the_store_forgets_the_oldest_traces_first_by_count() -> None:
    """What was heard of last stays whole; older traces go whole."""
    store = TraceStore(Bounds(spans=4))
    lost = store.add([span(1, 1), span(2, 2), span(1, 3), span(3, 4), span(3, 5)])
    assert (lost, store.spans) == (1, 4)
    assert [item["trace_id"][-1] for item in store.newest(9)] == ["3", "1"]
    assert store.trace(f"{2:032x}") == ()


def test_the_store_is_bounded_in_bytes_and_per_trace() -> None:
    """Neither big attributes nor one endless trace can fill the memory."""
    big = TraceStore(Bounds(bytes=10_000))
    for number in range(100):
        big.add([span(number, number, "x" * 1000)])
    assert big.bytes <= 10_000 and 1 <= big.spans < 10
    endless = TraceStore(Bounds(trace_spans=3))
    assert endless.add(span(1, number) for number in range(10)) == 7
    assert len(endless.trace(f"{1:032x}")) == 3


def test_a_repeated_batch_counts_once() -> None:
    """Exporters send again when they did not see the answer."""
    store = TraceStore(Bounds())
    store.add([span(1, 1)])
    store.add([span(1, 1)])
    assert store.spans == 1


def test_the_smoke_test_finds_every_flaw_of_an_answer() -> None:
    """An empty answer has five flaws, a good one none."""
    assert flaws(Answer("Hello", "stop", 3, 5, 0, "sha256:1", "t", 0.1, 0.2)) == []
    assert len(flaws(Answer(" ", "", 0, 0, 0, "", "t", 0.0, 0.1))) == 5
