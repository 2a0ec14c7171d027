"""Joins the step thread to the event loop: a request goes in, an asynchronous stream of its events comes out."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace

from engine.checkpoints.known_tokens import KnownTokens
from engine.checkpoints.variant import Variant
from engine.executors.interface import Executor
from engine.runtime.constraints import Compiler, Constraint, ConstraintError, Matcher
from engine.runtime.loop import Closed, Load, Loop, QueueFull, TooLong
from engine.runtime.pages import PagePool
from engine.runtime.sequences import Event, Failure, Finished, Request, Tokens
from services.chassis import deadlines
from services.chassis.errors import Internal, InvalidRequest, OutOfTime, ServiceError, TooBusy, Unavailable
from services.chassis.offload import Offload
from services.sparse_inference.handing import Heard, Outbox
from services.sparse_inference.prefixes import Found, Prefixes, Scope
from services.sparse_inference.settings import WorkerSettings

RETRY_AFTER_S = 1.0
MAX_MERGED_EVENTS = 4096
"""What waits for a slow reader is sent in pieces of at most this many tokens, the proto's bound of a chunk."""


class Worker:
    """One variant being served. Methods belong to the event loop it was made on."""

    def __init__(
        self,
        settings: WorkerSettings,
        variant: Variant,
        executor: Executor,
        prefixes: Prefixes,
        pages: PagePool,
        compiler: Compiler,
        known: KnownTokens | None = None,
    ) -> None:
        """`known`: the ids that are tokens; None: all of the vocabulary."""
        self.settings, self.variant, self.executor = settings, variant, executor
        self._prefixes, self._compiler = prefixes, compiler
        self._compiling = Offload("constraints", settings.constraint_threads, settings.constraints_waiting)
        self._events = asyncio.get_running_loop()
        self.kv_bytes_per_token = executor.page_bytes // executor.block_tokens
        self.weight_bytes = executor.weight_bytes
        self.context_tokens = min(
            variant.architecture.max_position_embeddings,
            executor.page_count * executor.block_tokens,
        )
        self.kv_capacity_bytes = executor.page_count * executor.page_bytes
        self._known = KnownTokens(variant.architecture.vocab_size) if known is None else known
        self._ends = frozenset(variant.architecture.end_token_ids)
        self._arriving = 0
        self._outbox = Outbox(settings.pace)
        self._loop = Loop(executor, settings.limits, pages, after_turn=self._hand_over, known=known)
        self.draining = False

    def start(self) -> None:
        self._loop.start()

    def load(self) -> Load:
        return self._loop.load()

    def drain(self) -> None:
        """Takes no new requests from here on; those at work go on."""
        self.draining = True
        self._loop.close()

    async def ended(self, timeout_s: float) -> bool:
        """After `drain`: waits until the step thread has ended. False when time ran out first."""
        self._compiling.close()
        return await asyncio.to_thread(self._loop.join, timeout_s)

    def check(self, request: Request) -> None:
        """Raises InvalidRequest for what only the model can know: vocabulary and context length."""
        asked = [*request.sampling.logit_bias, *request.stop_token_ids]
        for name, ids in (("token_ids", request.token_ids), ("logit_bias or stop_token_ids", asked)):
            if (unknown := self._known.first_unknown(ids)) is not None:
                raise InvalidRequest(f"{name}: {unknown} is no token of this model, which has {self._known.size}")
        if request.resumed_tokens >= len(request.token_ids):
            raise InvalidRequest("resumed_tokens must be fewer than token_ids")
        length = len(request.token_ids)
        needed = length + (1 if request.score_from is None else 0)
        if needed > self.context_tokens:
            raise InvalidRequest(
                f"the prompt has {length} tokens; this model's context is {self.context_tokens}, output included",
                prompt_tokens=length, context_tokens=self.context_tokens,
            )  # fmt: skip
        if request.score_from is None and length + request.max_tokens > self.context_tokens:
            raise InvalidRequest(
                f"prompt ({length}) and max_tokens ({request.max_tokens}) exceed the context of {self.context_tokens}",
                prompt_tokens=length, context_tokens=self.context_tokens,
            )  # fmt: skip

    async def run(
        self,
        request: Request,
        tenant: str,
        constraint: Constraint | None = None,
        admitted: Callable[[tuple[()]], Awaitable[None]] | None = None,
    ) -> AsyncIterator[Tokens | Finished]:
        """Yields tokens as they come, all that are ready at once, then one Finished. Closing it cancels the request.

        `admitted` is called once it has its place in the loop, before its first token.
        Raises InvalidRequest, TooBusy, Unavailable, OutOfTime or Internal.
        """
        self.check(request)
        if self.draining:
            raise Unavailable("the worker is draining")
        left = deadlines.remaining_s()
        deadline = None if left is None else time.monotonic() + left
        scope = Scope(self.variant.digest, tenant, self.executor.block_tokens)
        with _refusals():
            self._loop.check_room(self._arriving)
        self._arriving += 1
        try:
            matcher = None if constraint is None else await self._matcher(constraint, request)
            found = Found() if request.score_from is not None else await self._prefixes.find(scope, request.token_ids)
        finally:
            self._arriving -= 1
        queue: asyncio.Queue[Event] = asyncio.Queue()  # bounded by max_tokens: one event per token at most

        has_begun = False

        def listen(event: Event) -> None:
            nonlocal has_begun
            self._outbox.add(queue, event, is_first=not has_begun)
            has_begun = True

        prompts_own = frozenset(found.names)

        def publish(name: bytes, payload: Callable[[], bytes]) -> None:
            if not self._prefixes.has_room:
                self._prefixes.drop()
                return
            content = payload()
            with contextlib.suppress(RuntimeError):  # the event loop has ended; so has everyone who waits
                self._events.call_soon_threadsafe(self._prefixes.keep, scope, name, content, name in prompts_own)

        prepared = replace(
            request,
            scope=scope.key if request.score_from is None else None,
            block_names=found.names,
            prefix_blocks=found.fetched,
            on_block=publish if request.score_from is None else None,
            matcher=matcher,
            # A constraint says when the answer ends; going on past its end would have no meaning.
            end_token_ids=request.end_token_ids if matcher is None else self._ends,
            deadline=deadline,
        )
        with _refusals():
            running = self._loop.submit(prepared, listen)
        del found, prepared  # the payloads belong to the loop, which lets go of them when it begins
        try:
            if admitted is not None:
                await admitted(())
            while True:
                for event in _merge(await _ready(queue)):
                    if isinstance(event, Failure):
                        raise _ERRORS[event](event.value)
                    yield event
                    if isinstance(event, Finished):
                        return
        finally:
            self._loop.cancel(running)

    async def _matcher(self, constraint: Constraint, request: Request) -> Matcher:
        """The constraint's automaton after the resumed tokens; prepared off both loops, in bounded time."""
        resumed = request.token_ids[len(request.token_ids) - request.resumed_tokens :]
        budget_s = self.settings.constraint_ms / 1000
        try:
            async with asyncio.timeout(budget_s):
                return await self._compiling(self._compiler.compile, constraint, resumed)
        except TimeoutError:
            raise InvalidRequest(
                f"the {constraint.kind} could not be prepared within {budget_s:g} s; make it simpler",
                limit_ms=self.settings.constraint_ms,
            ) from None
        except ConstraintError as error:
            raise InvalidRequest(str(error), field=constraint.kind) from None

    def _hand_over(self) -> None:
        """On the step thread, after a turn: one crossing to the event loop for all that is due.

        What is not waits for a later turn. There is one: as long as a stream has no end, its request is at work.
        """
        if heard := self._outbox.due(time.monotonic()):
            with contextlib.suppress(RuntimeError):  # the event loop has ended; so has everyone who waits
                self._events.call_soon_threadsafe(_deliver, heard)


_ERRORS: dict[Failure, type[ServiceError]] = {
    Failure.EXPIRED: OutOfTime,
    Failure.CANCELLED: OutOfTime,
    Failure.CONSTRAINT: InvalidRequest,
    Failure.INTERNAL: Internal,
}


def _deliver(heard: Heard) -> None:
    for queue, events in heard:
        for event in events:
            queue.put_nowait(event)


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except TooLong as error:
        raise InvalidRequest(str(error)) from None
    except QueueFull as error:
        raise TooBusy(str(error), retry_after_s=RETRY_AFTER_S) from None
    except Closed as error:
        raise Unavailable(str(error)) from None


async def _ready(queue: asyncio.Queue[Event]) -> list[Event]:
    """Waits for one event and takes all that are there, within the bound."""
    events = [await queue.get()]
    while not queue.empty() and len(events) < MAX_MERGED_EVENTS:
        events.append(queue.get_nowait())
    return events


def _merge(events: list[Event]) -> list[Event]:
    """Joins neighbouring Tokens into one."""
    merged: list[Event] = []
    for key, group in itertools.groupby(events, lambda event: isinstance(event, Tokens)):
        if not key:
            merged += group
            continue
        tokens = [event for event in group if isinstance(event, Tokens)]
        merged.append(
            replace(
                tokens[-1],
                token_ids=tuple(itertools.chain.from_iterable(each.token_ids for each in tokens)),
                logprobs=tuple(itertools.chain.from_iterable(each.logprobs for each in tokens)),
            )
        )
    return merged
