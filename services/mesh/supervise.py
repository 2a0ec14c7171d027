"""Starts a set of processes, each when those before it are ready, and stops them the other way round."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from services.mesh.process import Patience, Phase, Process, Program


class StartFailed(Exception):
    """A program never became ready. The text has its last log lines."""


@dataclass(slots=True)
class Supervisor:
    """A set of processes, started in the order of their `after` and stopped the other way round."""

    programs: Iterable[Program]
    patience: Patience
    changed: Callable[[], None]
    processes: dict[str, Process] = field(init=False)
    _tasks: list[asyncio.Task[None]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.processes = {program.name: Process(program, self.patience, self.changed) for program in self.programs}
        check_order([process.program for process in self.processes.values()])

    def start(self) -> None:
        """Begins; returns at once."""
        self._tasks = [asyncio.create_task(self._in_turn(process)) for process in self.processes.values()]

    async def all_ready(self) -> None:
        """Returns when every process has been ready once. Raises `StartFailed` when one gives up."""
        together = asyncio.create_task(self._each_ready())
        try:
            pending = {together, *self._tasks}
            while not together.done():
                await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                pending = {task for task in pending if not task.done()}
                for process in self.processes.values():
                    if process.phase is Phase.FAILED:
                        raise StartFailed(_failure(process))
                for task in self._tasks:
                    if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                        raise error
        finally:
            together.cancel()

    async def stop(self) -> None:
        """Ends every process, dependents first. May be called twice."""
        for wave in reversed(waves([process.program for process in self.processes.values()])):
            await asyncio.gather(*(self.processes[name].stop() for name in wave))
        for process, task in zip(self.processes.values(), self._tasks, strict=False):
            if process.phase is Phase.WAITING:
                task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for process in self.processes.values():
            process.close()

    async def _each_ready(self) -> None:
        for process in self.processes.values():
            await process.was_ready.wait()

    async def _in_turn(self, process: Process) -> None:
        for name in process.program.after:
            await self.processes[name].was_ready.wait()
        await process.keep()


def waves(programs: Iterable[Program]) -> list[list[str]]:
    """Names in starting order; those of one wave need nothing from each other. Raises ValueError on a circle."""
    left = {program.name: set(program.after) for program in programs}
    result: list[list[str]] = []
    while left:
        wave = [name for name, after in left.items() if not after & left.keys()]
        if not wave:
            raise ValueError(f"these wait for each other: {', '.join(sorted(left))}")
        result.append(wave)
        for name in wave:
            del left[name]
    return result


def check_order(programs: list[Program]) -> None:
    """Raises ValueError when a program waits for one that does not exist, or for itself in the end."""
    names = {program.name for program in programs}
    for program in programs:
        if unknown := set(program.after) - names:
            raise ValueError(f"{program.name} waits for unknown {', '.join(sorted(unknown))}")
    waves(programs)


def _failure(process: Process) -> str:
    lines = "\n".join(f"    {line}" for line in process.last_lines())
    return f"{process.program.name} did not start ({process.last_exit}); the end of {process.program.log}:\n{lines}"
