"""The supervisor with tiny real processes: ready, crash, back off, give up, stop, die."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from services.mesh.process import Patience, Phase, Program, backoff_s
from services.mesh.supervise import StartFailed, Supervisor
from tests.fakes.processes import is_alive

QUICK = Patience(start_timeout_s=10, start_attempts=2, backoff_first_s=0.01, backoff_cap_s=0.05, grace_s=0.5)
READY = "import sys,time,json; print(json.dumps({'message': 'ready', 'grpc_port': 7}), file=sys.stderr, flush=True); "
DEADLINE_S = 20.0


def program(folder: Path, name: str, code: str, after: tuple[str, ...] = ()) -> Program:
    return Program(name, (sys.executable, "-I", "-S", "-c", code), dict(os.environ), folder / f"{name}.log", after)


class Watched:
    """A supervisor whose changes can be waited for."""

    def __init__(self, programs: list[Program], patience: Patience = QUICK) -> None:
        self._changes = asyncio.Event()
        self.supervisor = Supervisor(programs, patience, self._changes.set)

    def __getitem__(self, name: str):  # type: ignore[no-untyped-def]  # a Process
        return self.supervisor.processes[name]

    async def until(self, claim: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not claim():
                self._changes.clear()
                await self._changes.wait()


async def until(claim: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not claim():  # noqa: ASYNC110  # the kernel signals nothing here
            await asyncio.sleep(0.01)


async def test_a_ready_line_makes_a_process_ready_and_its_facts_known(tmp_path: Path) -> None:
    """The chassis' ready line is what counts, not that the process runs."""
    watched = Watched([program(tmp_path, "one", READY + "time.sleep(60)")])
    watched.supervisor.start()
    try:
        await asyncio.wait_for(watched.supervisor.all_ready(), DEADLINE_S)
        assert watched["one"].phase is Phase.READY
        assert watched["one"].facts["grpc_port"] == 7
    finally:
        await watched.supervisor.stop()
    assert watched["one"].phase is Phase.STOPPED


async def test_a_program_starts_only_when_those_before_it_are_ready(tmp_path: Path) -> None:
    """Order holds: the second is not even started before the first is ready."""
    gate = tmp_path / "gate"
    slow = f"import os,time\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.01)\n" + READY + "time.sleep(60)"
    watched = Watched(
        [
            program(tmp_path, "first", slow),
            program(tmp_path, "second", READY + "time.sleep(60)", after=("first",)),
        ]
    )
    watched.supervisor.start()
    try:
        await watched.until(lambda: watched["first"].pid is not None)
        assert watched["second"].phase is Phase.WAITING and watched["second"].pid is None
        gate.touch()
        await asyncio.wait_for(watched.supervisor.all_ready(), DEADLINE_S)
    finally:
        await watched.supervisor.stop()


async def test_a_crash_is_restarted_with_growing_pauses_and_counted(tmp_path: Path) -> None:
    """A crash loop is visible: restarts grow, the last exit is said."""
    watched = Watched([program(tmp_path, "one", READY + "sys.exit(3)")])
    watched.supervisor.start()
    try:
        await watched.until(lambda: watched["one"].restarts >= 3)
        assert watched["one"].last_exit == "exit status 3"
        assert watched["one"].phase in (Phase.BACKING_OFF, Phase.STARTING, Phase.READY)
    finally:
        await watched.supervisor.stop()


def test_pauses_double_up_to_the_cap() -> None:
    """However long the crash loop, the pause stays within its cap."""
    patience = Patience(backoff_first_s=0.2, backoff_cap_s=10)
    assert [backoff_s(patience, n) for n in (1, 2, 3)] == [0.2, 0.4, 0.8]
    assert backoff_s(patience, 10_000) == 10


async def test_what_never_becomes_ready_is_named_with_its_last_words(tmp_path: Path) -> None:
    """The error of a failed start has the name, the exit status and the end of the log."""
    watched = Watched(
        [
            program(tmp_path, "fine", READY + "time.sleep(60)"),
            program(tmp_path, "broken", "print('no such model'); raise SystemExit(2)"),
        ]
    )
    watched.supervisor.start()
    try:
        with pytest.raises(StartFailed, match=r"broken did not start \(exit status 2\)[\s\S]*no such model"):
            await asyncio.wait_for(watched.supervisor.all_ready(), DEADLINE_S)
        assert watched["broken"].phase is Phase.FAILED
    finally:
        await watched.supervisor.stop()


async def test_a_program_that_does_not_exist_is_named(tmp_path: Path) -> None:
    """A wrong command is reported like any other failed start."""
    watched = Watched([Program("none", ("/no/such/program",), {}, tmp_path / "none.log")])
    watched.supervisor.start()
    try:
        with pytest.raises(StartFailed, match="cannot start /no/such/program"):
            await asyncio.wait_for(watched.supervisor.all_ready(), DEADLINE_S)
    finally:
        await watched.supervisor.stop()


async def test_a_process_that_is_never_ready_is_ended_in_time(tmp_path: Path) -> None:
    """Hanging at start is a failed start, after the start timeout."""
    patience = Patience(start_timeout_s=0.3, start_attempts=1, grace_s=0.2)
    watched = Watched([program(tmp_path, "mute", "import time; time.sleep(60)")], patience)
    watched.supervisor.start()
    try:
        with pytest.raises(StartFailed, match=r"not ready after 0\.3 s"):
            await asyncio.wait_for(watched.supervisor.all_ready(), DEADLINE_S)
    finally:
        await watched.supervisor.stop()


async def test_a_long_start_lives_while_it_tells_progress(tmp_path: Path) -> None:
    """Every new progress line begins the start timeout anew, is shown, and is forgotten when the process is ready."""
    tell = "print(json.dumps({'message': 'progress', 'doing': 'packing', 'done': n, 'total': 9}), flush=True)"
    code = f"import json,time\nfor n in range(10): {tell}; time.sleep(0.4)\n" + READY + "time.sleep(60)"
    seen: list[object] = []
    patience = Patience(start_timeout_s=3.0, start_attempts=1, grace_s=0.2)
    watched = Watched([program(tmp_path, "packer", code)], patience)
    watched.supervisor.start()
    try:
        await watched.until(lambda: seen.append(watched["packer"].progress) or watched["packer"].was_ready.is_set())
        assert any(isinstance(each, dict) and each.get("done", 0) > 5 for each in seen)
        assert watched["packer"].progress == {}
    finally:
        await watched.supervisor.stop()


async def test_what_is_told_nonsense_is_not_tried_again(tmp_path: Path) -> None:
    """Exit status 2 before the first ready: the reason is shown at once, not after further attempts."""
    patience = Patience(start_timeout_s=10, start_attempts=100, backoff_first_s=10, backoff_cap_s=10)
    watched = Watched([program(tmp_path, "wrong", "print('no such model'); raise SystemExit(2)")], patience)
    watched.supervisor.start()
    try:
        with pytest.raises(StartFailed, match="no such model"):
            await asyncio.wait_for(watched.supervisor.all_ready(), DEADLINE_S)
        assert watched["wrong"].restarts == 0
    finally:
        await watched.supervisor.stop()


async def test_stop_is_graceful_then_firm_and_may_be_called_twice(tmp_path: Path) -> None:
    """SIGTERM is ignored by this one, so SIGKILL follows after the grace; its child goes too."""
    stubborn = (
        "import signal,subprocess,sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "child = subprocess.Popen(['sleep', '60']); print(child.pid, flush=True); " + READY + "time.sleep(60)"
    )
    watched = Watched([program(tmp_path, "one", stubborn)])
    watched.supervisor.start()
    await asyncio.wait_for(watched.supervisor.all_ready(), DEADLINE_S)
    pid, child = watched["one"].pid, int(watched["one"].last_lines()[0])
    began = time.monotonic()
    await watched.supervisor.stop()
    assert time.monotonic() - began >= QUICK.grace_s
    assert not is_alive(pid)
    await until(lambda: not is_alive(child))
    await watched.supervisor.stop()


async def test_stop_before_anything_is_ready_ends_everything(tmp_path: Path) -> None:
    """Ctrl-C while starting leaves nothing behind, neither started nor waiting."""
    watched = Watched(
        [
            program(tmp_path, "slow", "import time; time.sleep(60)"),
            program(tmp_path, "later", READY, after=("slow",)),
        ]
    )
    watched.supervisor.start()
    await watched.until(lambda: watched["slow"].pid is not None)
    pid = watched["slow"].pid
    await watched.supervisor.stop()
    assert not is_alive(pid)


async def test_killing_the_supervisor_leaves_no_orphans(tmp_path: Path) -> None:
    """`kill -9` of the supervisor takes its processes with it, at once."""
    code = f"""
import asyncio, os, sys
from pathlib import Path
from services.mesh.process import Patience, Program
from services.mesh.supervise import Supervisor
async def main():
    command = (sys.executable, "-I", "-S", "-c", {READY + "time.sleep(60)"!r})
    programs = [Program(n, command, dict(os.environ), Path({str(tmp_path)!r}) / n) for n in ("a", "b")]
    supervisor = Supervisor(programs, Patience(), lambda: None)
    supervisor.start()
    await supervisor.all_ready()
    print(*(process.pid for process in supervisor.processes.values()), flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    assert parent.stdout is not None
    pids = [int(word) for word in (await asyncio.wait_for(parent.stdout.readline(), DEADLINE_S)).split()]
    assert len(pids) == 2 and all(is_alive(pid) for pid in pids)
    os.kill(parent.pid, signal.SIGKILL)
    await parent.wait()
    await until(lambda: not any(is_alive(pid) for pid in pids))


async def test_logs_are_bounded_whatever_a_process_prints(tmp_path: Path) -> None:
    """Endless output and endless lines end up in at most two files of the given size."""
    patience = Patience(start_timeout_s=10, grace_s=0.5, log_bytes=20_000)
    chatty = "import sys\nfor n in range(5000): print('line', n)\n"
    chatty += "sys.stdout.write('x' * 300000 + '\\n'); sys.stdout.flush()\n"
    watched = Watched([program(tmp_path, "one", chatty + READY + "time.sleep(60)")], patience)
    watched.supervisor.start()
    try:
        await asyncio.wait_for(watched.supervisor.all_ready(), DEADLINE_S)
        sizes = {path.name: path.stat().st_size for path in list(tmp_path.glob("*"))}  # noqa: ASYNC240  # tiny
        assert sizes.keys() == {"one.log", "one.log.1"} and max(sizes.values()) <= 20_000
    finally:
        await watched.supervisor.stop()


def test_programs_that_wait_for_each_other_are_refused(tmp_path: Path) -> None:
    """A circle would wait for ever; it is an error at once."""
    circle = [program(tmp_path, "a", "", after=("b",)), program(tmp_path, "b", "", after=("a",))]
    with pytest.raises(ValueError, match="wait for each other: a, b"):
        Supervisor(circle, QUICK, lambda: None)
