"""The control loop outlives bugs, half answers and files that never rest; a start believes only the living."""

from __future__ import annotations

import asyncio
import fcntl
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from services.mesh import control, rundir, start
from services.mesh.control import Control, Pace, fingerprint, has_settled
from services.mesh.envoy import Admin
from services.mesh.local import CannotStart
from services.mesh.registry import Registry
from services.mesh.rundir import RunDirectory, write_atomically
from services.mesh.state import Addresses, MeshState
from services.mesh.translate import NodeSettings

NOBODY = 1
"""A port on which no admin page is."""


@asynccontextmanager
async def running(policy: Path, registry: Callable[[], Registry]) -> AsyncIterator[Control]:
    """A control loop at work over a folder, without an Envoy."""
    node = NodeSettings(run_directory=policy.parent / "envoy")
    made = Control(policy, node, Admin("127.0.0.1", NOBODY), registry, Pace(0.01, 0.1), lambda: None)
    task = asyncio.create_task(made.run())
    try:
        yield made
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def until(claim: Callable[[], Any]) -> None:
    while not claim():  # noqa: ASYNC110  # the state of a thing under test; nothing in it could signal us
        await asyncio.sleep(0.005)


async def test_a_bug_is_reported_and_the_loop_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception nobody thought of is shown as a refusal, and endpoints are tried again."""
    monkeypatch.setattr(control, "RECOVERY_S", 0.01)
    (tmp_path / "policy").mkdir()
    asked: list[int] = []

    def registry() -> Registry:
        asked.append(1)
        raise RuntimeError("surprise")

    async with running(tmp_path / "policy", registry) as made:
        made.endpoints_changed()
        await until(lambda: len(asked) >= 3)
        assert "surprise" in made.state.refused[0]


async def test_files_are_read_when_they_rest(tmp_path: Path) -> None:
    """A file that is rewritten all the time is not read half-way: nothing is served from it, and status says so."""
    policy = tmp_path / "policy"
    policy.mkdir()
    read: list[int] = []

    def registry() -> Registry:
        read.append(1)
        return Registry(())

    async def rewrite() -> None:
        while True:
            (policy / "a.yaml").write_text("kind: Nothing\n")
            await asyncio.sleep(0.002)

    async with running(policy, registry) as made:
        writer = asyncio.create_task(rewrite())
        try:
            await until(lambda: made.state.refused)
            assert "do not stop changing" in made.state.refused[0] and read == []
        finally:
            writer.cancel()
        await until(lambda: "unknown kind 'Nothing'" in made.state.refused[0])


def test_every_change_shows(tmp_path: Path) -> None:
    """Same size and same time stamp, but another file: that is a change; a change of this moment has not settled."""
    path = tmp_path / "a.yaml"
    path.write_text("a: 1")
    stamp = path.stat()
    before = fingerprint(tmp_path)
    (tmp_path / "new").write_text("a: 2")
    os.utime(tmp_path / "new", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    (tmp_path / "new").replace(path)
    assert fingerprint(tmp_path) != before
    changed_ns = stamp.st_mtime_ns
    assert not has_settled(before, changed_ns + 1_000_000)
    assert has_settled(before, changed_ns + 1_000_000_000)
    assert has_settled(before, changed_ns - 1_000_000_000), "a stamp from the future must not stop edits for ever"


async def test_half_an_answer_of_envoys_is_no_answer() -> None:
    """Envoy dies while it writes: callers see the OSError they are ready for."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b'HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{"stats": [')
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        admin = Admin("127.0.0.1", server.sockets[0].getsockname()[1])
        for ask in (admin.texts, admin.refusals, admin.clusters):
            with pytest.raises(OSError, match="half an answer"):
                await ask()


def leave_state(directory: RunDirectory, pid: int, phase: str) -> None:
    nowhere = Addresses(ingress="", admin="", otlp="", traces="")
    made = MeshState.model_validate({"phase": phase, "pid": pid, "started_unix_s": 0, "addresses": nowhere})
    write_atomically(directory.state, made.model_dump_json())


def test_what_a_dead_mesh_left_behind_is_not_believed(tmp_path: Path) -> None:
    """A state file that says "up" counts only if its supervisor is the one that holds the directory."""
    directory = RunDirectory(tmp_path)
    with directory.hold():
        leave_state(directory, 1, "up")
        with pytest.raises(CannotStart, match="not up"):
            start.wait_up(directory, None, 0.2, lambda _: None)
        leave_state(directory, os.getpid(), "up")
        assert start.wait_up(directory, None, 5, lambda _: None).pid == os.getpid()
        leave_state(directory, os.getpid(), "stopping")
        with pytest.raises(CannotStart, match="stopped before it was up"):
            start.wait_up(directory, None, 5, lambda _: None)


def test_of_two_starts_the_slower_waits_for_the_quicker(tmp_path: Path) -> None:
    """A supervisor that ended because another holds the directory: the other's mesh is the one to use."""
    directory = RunDirectory(tmp_path)
    with subprocess.Popen([sys.executable, "-c", ""]) as ours:
        ours.wait()
    with directory.hold():
        leave_state(directory, os.getpid(), "up")
        assert start.wait_up(directory, ours, 5, lambda _: None).pid == os.getpid()


def test_asking_who_holds_a_directory_does_not_keep_one_from_holding_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The question takes the lock for a moment; a supervisor that starts in that moment must not give up."""
    directory = RunDirectory(tmp_path)
    tmp_path.joinpath("lock").touch()
    descriptor = os.open(directory.lock, os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    # The moment is over when the supervisor waits for the first time.
    monkeypatch.setattr(rundir, "time", SimpleNamespace(sleep=lambda _: os.close(descriptor)))
    with directory.hold():
        assert directory.holder() == os.getpid()
