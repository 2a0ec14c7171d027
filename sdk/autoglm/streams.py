"""One answer on its way: `Stream` for threads, `AsyncStream` for asyncio.

Both feed an `Assembly` and end in exactly one of two ways: with `Done`, or with an `AutoglmError` that holds what had
come. `autoglm.client` and `autoglm.async_client` make them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Self, TypeAlias, cast

import grpc

from autoglm.assembly import Assembly
from autoglm.completion import Choice, Completion
from autoglm.errors import AutoglmError, CallCancelledError
from autoglm.events import Done, Event
from autoglm.statuses import EndedCall, cancelled_on_the_way, text_metadata

Call: TypeAlias = Any
"""A grpcio call with a stream of GenerateResponse; grpc-stubs leaves half of its methods untyped."""


class Stream(Iterator[Event]):
    """One answer, event by event: iterate it, and leave its `with` block early to cancel the call.

    Ends after `Done` or with an `AutoglmError`, whose `partial` holds what had come; never silently. Iterate from one
    thread; `cancel` may be called from any.
    """

    def __init__(
        self,
        call: Call,
        assembly: Assembly,
        model: str,
        fail: Callable[[EndedCall, Assembly], AutoglmError],
    ) -> None:
        self._call, self._assembly, self._model, self._fail = call, assembly, model, fail
        self._end: Done | AutoglmError | None = None
        self._is_cancelled = False

    @property
    def request_id(self) -> str:
        """The gateway's name for this request; empty before the first event."""
        return self._assembly.request_id

    @property
    def trace_id(self) -> str:
        """Trace of this request; empty until the gateway has told it, at the latest with `Done`."""
        return self._assembly.trace_id

    @property
    def choices(self) -> tuple[Choice, ...]:
        """What has arrived so far: the choices that have begun, in order."""
        return self._assembly.choices()

    @property
    def variant_digest(self) -> str:
        """Digest of the variant that answers; empty before the first event."""
        return self._assembly.variant_digest

    def __next__(self) -> Event:
        if isinstance(self._end, AutoglmError):
            raise self._end
        if self._end is not None:
            raise StopIteration
        try:
            return self._advance()
        except AutoglmError as error:
            self._call.cancel()
            self._end = error
            raise
        except BaseException:  # above all KeyboardInterrupt: nobody will read on, so the mesh should stop working
            self.cancel()
            raise

    def result(self) -> Completion:
        """Reads to the end and returns the whole answer, earlier events included."""
        for _ in self:
            pass
        if isinstance(self._end, Done):
            return self._assembly.completion(self._model, self._end)
        raise CallCancelledError("the stream was cancelled", partial=self._assembly.choices())

    def cancel(self) -> None:
        """Ends the call now; the mesh stops generating. A reader in another thread gets `CallCancelledError`."""
        self._is_cancelled = True
        self._call.cancel()

    close = cancel

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._end is None:
            self.cancel()

    def _advance(self) -> Event:
        assembly = self._assembly
        try:
            for response in self._call:
                if not assembly.has_begun:
                    assembly.note(text_metadata(_metadata(self._call.initial_metadata())))
                event = assembly.take(response)
                if event is not None:
                    return event
            assembly.note(text_metadata(_metadata(self._call.trailing_metadata())))
            self._end = assembly.done()
            return self._end
        except grpc.RpcError as error:
            failure = self._fail(cast("EndedCall", error), assembly)
            if self._is_cancelled:
                failure = CallCancelledError("the stream was cancelled", code="CANCELLED")
            raise assembly.explain(failure) from error
        except AutoglmError as error:
            raise assembly.explain(error) from None


class AsyncStream(AsyncIterator[Event]):
    """One answer, event by event: `async for`, inside `async with` so that leaving early cancels the call.

    Ends after `Done` or with an `AutoglmError`, whose `partial` holds what had come; never silently. The call starts
    with the first event asked for.
    """

    def __init__(
        self,
        begin: Callable[[], Awaitable[Call]],
        assembly: Assembly,
        model: Callable[[], str],
        fail: Callable[[EndedCall, Assembly], AutoglmError],
        target: str,
    ) -> None:
        self._begin, self._assembly, self._model, self._fail, self._target = begin, assembly, model, fail, target
        self._call: Call | None = None
        self._end: Done | AutoglmError | None = None
        self._is_cancelled = False

    @property
    def request_id(self) -> str:
        """The gateway's name for this request; empty before the first event."""
        return self._assembly.request_id

    @property
    def trace_id(self) -> str:
        """Trace of this request; empty until the gateway has told it, at the latest with `Done`."""
        return self._assembly.trace_id

    @property
    def choices(self) -> tuple[Choice, ...]:
        """What has arrived so far: the choices that have begun, in order."""
        return self._assembly.choices()

    @property
    def variant_digest(self) -> str:
        """Digest of the variant that answers; empty before the first event."""
        return self._assembly.variant_digest

    async def __anext__(self) -> Event:
        if isinstance(self._end, AutoglmError):
            raise self._end
        if self._end is not None:
            raise StopAsyncIteration
        try:
            return await self._advance()
        except AutoglmError as error:
            if self._call is not None:
                self._call.cancel()
            self._end = error
            raise
        except BaseException:  # above all the task's own cancellation: nobody will read on
            self.cancel()
            raise

    async def result(self) -> Completion:
        """Reads to the end and returns the whole answer, earlier events included."""
        async for _ in self:
            pass
        if isinstance(self._end, Done):
            return self._assembly.completion(self._model(), self._end)
        raise CallCancelledError("the stream was cancelled", partial=self._assembly.choices())

    def cancel(self) -> None:
        """Ends the call now; the mesh stops generating. A task that reads on gets `CallCancelledError`."""
        self._is_cancelled = True
        if self._call is not None:
            self._call.cancel()

    async def aclose(self) -> None:
        """Same as `cancel`."""
        self.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._end is None:
            self.cancel()

    async def _advance(self) -> Event:
        assembly = self._assembly
        try:
            if self._call is None:
                call = None if self._is_cancelled else await self._begin()
                if call is None or self._is_cancelled:  # cancelled before or while the call was being made
                    raise CallCancelledError("the stream was cancelled", code="CANCELLED")
                self._call = call
            async for response in self._call:
                if not assembly.has_begun:
                    assembly.note(text_metadata(await self._call.initial_metadata()))
                event = assembly.take(response)
                if event is not None:
                    return event
            assembly.note(text_metadata(await self._call.trailing_metadata()))
            self._end = assembly.done()
            return self._end
        except grpc.RpcError as error:
            raise self._failed(self._fail(cast("EndedCall", error), assembly)) from error
        except AutoglmError as error:
            raise assembly.explain(error) from None
        except asyncio.CancelledError:
            if task_is_cancelled():
                raise
            raise self._failed(cancelled_on_the_way(self._target, has_begun=assembly.has_begun)) from None

    def _failed(self, failure: AutoglmError) -> AutoglmError:
        if self._is_cancelled:
            failure = CallCancelledError("the stream was cancelled", code="CANCELLED")
        return self._assembly.explain(failure)


def task_is_cancelled() -> bool:
    """grpc.aio reports a cancelled *call* as if the *task* had been cancelled; only the latter may travel on."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


def _metadata(pairs: object) -> Iterable[tuple[str, str | bytes]]:
    return cast("Iterable[tuple[str, str | bytes]]", pairs or ())
