"""A pool of helper processes that run chat templates under limits of time, memory and output.

A helper that overruns is killed and replaced; the others and the event loop never notice. The frames are JSON: nothing
that comes back from a helper is ever trusted to be more than text.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client import Counter, Histogram

from services.chassis.errors import InvalidRequest, TooBusy, Unavailable

log = logging.getLogger("autoglm.tokenizer.sandbox")

CHILD = Path(__file__).with_name("template_child.py")

RENDER_SECONDS = Histogram(
    "autoglm_template_render_seconds",
    "Time one chat template took in its helper process",
    buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1),
)
STOPPED = Counter("autoglm_template_stopped_total", "Renders that were stopped, by the limit they broke", ["limit"])

_LIMITED = {"output": "wrote more than {output_bytes} bytes", "memory": "used more than {memory_bytes} bytes of memory"}


@dataclass(frozen=True, slots=True)
class Limits:
    """What one helper may use."""

    time_s: float
    start_s: float
    memory_bytes: int
    output_bytes: int
    today: str


@dataclass(frozen=True, slots=True)
class TemplateSource:
    """A template to compile: `marks` are written instead of the control tokens that its own text spells."""

    name: str
    text: str
    marks: Mapping[str, str]
    variables: Mapping[str, str]


class Sandbox:
    """`processes` helpers, each with every template compiled. `start`, `render` from one event loop, `close`."""

    def __init__(self, limits: Limits, processes: int, max_waiting: int) -> None:
        self._limits = limits
        self._sources: list[TemplateSource] = []
        self._wanted, self._max_waiting = processes, max_waiting
        self._idle: asyncio.Queue[_Helper] = asyncio.Queue()
        self._accepted = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        self._helpers: set[_Helper] = set()

    async def start(self, sources: Sequence[TemplateSource]) -> dict[str, str]:
        """Starts the helpers. Returns name → reason for templates that do not compile; those cannot be rendered."""
        self._sources = list(sources)
        broken: dict[str, str] = {}
        while self._idle.qsize() < self._wanted:
            try:
                self._idle.put_nowait(await self._spawn())
            except _DoesNotCompile as error:
                broken[error.template] = error.reason
                self._sources = [source for source in self._sources if source.name != error.template]
        return broken

    async def close(self) -> None:
        """Ends every helper."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(helper.kill() for helper in list(self._helpers)))

    @property
    def pids(self) -> list[int]:
        """Process ids of the helpers, for operators and tests."""
        return [helper.pid for helper in self._helpers]

    async def render(self, name: str, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        """The template's output, marks included. Raises InvalidRequest when it refuses or breaks a limit."""
        if self._accepted >= self._wanted + self._max_waiting:
            raise TooBusy("too many chats are waiting to be rendered", self._limits.time_s, limit=self._max_waiting)
        self._accepted += 1
        request = {
            "op": "render",
            "name": name,
            "messages": list(messages),
            "add_generation_prompt": add_generation_prompt,
        }
        # The exchange outlives a cancelled caller: a helper is only free again once its answer has been read.
        task = self._own(self._exchange(request))
        answer = await asyncio.shield(task)
        return self._text(answer)

    async def _exchange(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        helper: _Helper | None = None
        try:
            helper = await self._idle.get()
            started = time.monotonic()
            answer = await helper.ask(request, self._limits.time_s)
            RENDER_SECONDS.observe(time.monotonic() - started)
        except BaseException:
            if helper is not None:
                self._own(self._replace(helper))
            raise
        finally:
            self._accepted -= 1
        if answer.get("error") in ("died", "time", "memory"):
            self._own(self._replace(helper))
        else:
            self._idle.put_nowait(helper)
        return answer

    def _text(self, answer: Mapping[str, Any]) -> str:
        if isinstance(text := answer.get("text"), str):
            return text
        kind, words = str(answer.get("error")), str(answer.get("message", ""))
        if kind == "refused":
            raise InvalidRequest(f"the chat template refuses this conversation{': ' if words else ''}{words[:200]}")
        STOPPED.labels(kind).inc()
        if kind == "time":
            limit_ms = round(self._limits.time_s * 1000)
            raise InvalidRequest(f"the chat template took longer than {limit_ms} ms", limit_ms=limit_ms)
        if kind in _LIMITED:
            facts = {"output_bytes": self._limits.output_bytes, "memory_bytes": self._limits.memory_bytes}
            raise InvalidRequest(f"the chat template {_LIMITED[kind].format(**facts)}", **facts)
        if kind == "died":
            raise InvalidRequest("the chat template's process was ended by its limits")
        raise InvalidRequest(f"the chat template failed on this conversation: {words[:100]}")

    async def _replace(self, helper: _Helper) -> None:
        await helper.kill()
        self._helpers.discard(helper)
        delay_s = 0.1
        while True:
            try:
                self._idle.put_nowait(await self._spawn())
                return
            except Exception:
                log.exception("a template helper does not start; trying again", extra={"facts": {"delay_s": delay_s}})
                await asyncio.sleep(delay_s)
                delay_s = min(delay_s * 2, 5.0)

    async def _spawn(self) -> _Helper:
        helper = await _Helper.start(self._limits)
        self._helpers.add(helper)
        try:
            for source in self._sources:
                load = {
                    "op": "load",
                    "name": source.name,
                    "source": source.text,
                    "marks": dict(source.marks),
                    "variables": dict(source.variables),
                }
                answer = await helper.ask(load, self._limits.start_s)
                if "text" not in answer:
                    raise _DoesNotCompile(source.name, str(answer.get("message") or answer.get("error"))[:200])
        except BaseException:
            self._helpers.discard(helper)
            await helper.kill()
            raise
        return helper

    def _own(self, work: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # a caller that went away leaves it unread


class _DoesNotCompile(Exception):
    def __init__(self, template: str, reason: str) -> None:
        super().__init__(template, reason)
        self.template, self.reason = template, reason


class _Helper:
    """One process. At most one `ask` at a time."""

    def __init__(self, process: Process, largest_answer: int) -> None:
        self._process, self._largest_answer = process, largest_answer

    @property
    def pid(self) -> int:
        return self._process.pid

    @classmethod
    async def start(cls, limits: Limits) -> _Helper:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", str(CHILD), stdin=PIPE, stdout=PIPE, stderr=asyncio.subprocess.DEVNULL, env={}
        )
        # A character may take six bytes of JSON.
        helper = cls(process, limits.output_bytes * 6 + 4096)
        terms = {
            "today": limits.today,
            "max_output_bytes": limits.output_bytes,
            "memory_bytes": limits.memory_bytes,
            "cpu_s": limits.time_s,
        }
        answer = await helper.ask(terms, limits.start_s)
        if not answer.get("ready"):
            await helper.kill()
            raise Unavailable("a template helper did not start")
        return helper

    async def ask(self, request: Mapping[str, Any], timeout_s: float) -> Mapping[str, Any]:
        """The answer, or {"error": "time" | "died"}; after either the helper is of no more use."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._ask(request)
        except TimeoutError:
            return {"error": "time"}
        except (OSError, EOFError, ValueError):
            return {"error": "died"}

    async def _ask(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        data = json.dumps(request, ensure_ascii=False).encode()
        stdin.write(len(data).to_bytes(4, "little") + data)
        await stdin.drain()
        size = int.from_bytes(await stdout.readexactly(4), "little")
        if size > self._largest_answer:
            raise ValueError("a template helper answers more than it may")
        answer = json.loads(await stdout.readexactly(size))
        if not isinstance(answer, dict):
            raise ValueError("a template helper answers no object")
        return answer

    async def kill(self) -> None:
        """Ends the process; may be called twice."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
