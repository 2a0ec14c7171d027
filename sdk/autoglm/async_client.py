"""The asyncio client: the same calls as `autoglm.client`, awaited. Cancelling a task cancels its call in the mesh."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack, cast

import grpc

from autoglm import wire
from autoglm.assembly import Assembly
from autoglm.completion import Completion, Health, Model, TokenCount
from autoglm.connection import DEFAULT_MAX_ANSWER_BYTES, DEFAULT_TIMEOUT_S, Tls, connection
from autoglm.deadline import Deadline, timeout_of
from autoglm.errors import AutoglmError, NotFoundError
from autoglm.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from autoglm.requests import (
    CallOptions,
    GenerateOptions,
    Messages,
    check_names,
    conversation,
    count_request,
    generate_request,
    set_model,
    sole_model,
)
from autoglm.statuses import EndedCall, cancelled_on_the_way, error_of
from autoglm.streams import AsyncStream, Call, task_is_cancelled

_Answer = TypeVar("_Answer")


class AsyncClient:
    """A client of the mesh for asyncio. Arguments and methods are those of `Client`; use it within one event loop.

    async with AsyncClient() as client:
        completion = await client.generate("Once upon a time", max_tokens=32)
        async with client.stream("Once upon a time") as stream:
            async for event in stream:
                ...
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        tls: Tls | bool = False,
        token: str | None = None,
        metadata: Mapping[str, str] | None = None,
        timeout: float | None = DEFAULT_TIMEOUT_S,
        model: str | None = None,
        max_answer_bytes: int = DEFAULT_MAX_ANSWER_BYTES,
    ) -> None:
        self._connection = connection(target, tls, token, metadata, timeout, model, max_answer_bytes)
        self._model = self._connection.model
        self._opened: grpc.aio.Channel | None = None
        self._is_closed = False

    @property
    def target(self) -> str:
        """Where this client connects."""
        return self._connection.target

    async def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        token_ids: Iterable[int] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Completion:
        """Generates and waits for the whole answer. Give one of `prompt`, `messages` or `token_ids`."""
        async with self.stream(prompt, messages=messages, token_ids=token_ids, **options) as stream:
            return await stream.result()

    async def chat(
        self, message: str | Messages, *, system: str | None = None, **options: Unpack[GenerateOptions]
    ) -> Completion:
        """Answers a conversation: a string is one user message, a list is the whole talk so far."""
        return await self.generate(messages=conversation(message, system), **options)

    def stream(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        token_ids: Iterable[int] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncStream:
        """The events of an answer as they come: `Delta`, one `Finish` per choice, then `Done`. Not awaited itself."""
        request = generate_request(prompt, messages, token_ids, options)
        timeout_s = timeout_of(options, self._connection.timeout_s)
        metadata = self._connection.metadata_of(options.get("metadata") or {})

        async def begin() -> Call:
            deadline = Deadline(timeout_s)
            set_model(request, options.get("model") or await self._default_model(deadline))
            return self._stub().Generate(request, timeout=deadline.remaining_s(), metadata=metadata)

        def fail(ended: EndedCall, assembly: Assembly) -> AutoglmError:
            return error_of(ended, self.target, timeout_s, has_begun=assembly.has_begun)

        assembly = Assembly(request.choices, self._connection.max_answer_bytes)
        return AsyncStream(begin, assembly, lambda: request.model, fail, self.target)

    async def count_tokens(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        model: str | None = None,
        **options: Unpack[CallOptions],
    ) -> TokenCount:
        """How many tokens a prompt takes, the model's own prefix included."""
        check_names(options, CallOptions.__optional_keys__)
        request = count_request(prompt, messages)
        deadline = Deadline(timeout_of(options, self._connection.timeout_s))
        set_model(request, model or await self._default_model(deadline))
        return wire.count_of(await self._unary(self._stub().CountTokens, request, deadline, options))

    async def models(self, **options: Unpack[CallOptions]) -> tuple[Model, ...]:
        """The models that can be asked for."""
        check_names(options, CallOptions.__optional_keys__)
        return await self._models(Deadline(timeout_of(options, self._connection.timeout_s)), options)

    async def health(self, service: str = wire.GATEWAY_SERVICE, **options: Unpack[CallOptions]) -> Health:
        """Asks the gateway (grpc.health.v1) whether it serves; raises `UnavailableError` when nobody answers."""
        check_names(options, CallOptions.__optional_keys__)
        deadline = Deadline(timeout_of(options, self._connection.timeout_s))
        check: Any = self._channel().unary_unary(wire.HEALTH_METHOD)  # type: ignore[call-arg]  # bytes both ways
        started = time.monotonic()
        try:
            answer: bytes = await self._unary(check, wire.health_request(service), deadline, options)
        except NotFoundError:
            return Health("service_unknown", time.monotonic() - started)
        return wire.health_of(answer, time.monotonic() - started)

    async def close(self) -> None:
        """Closes the channel; calls still under way are cancelled."""
        self._is_closed = True
        if self._opened is not None:
            await self._opened.close()  # type: ignore[call-arg]  # grace has a default

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"AsyncClient({self.target!r})"

    def _channel(self) -> grpc.aio.Channel:
        """The channel, made at the first call because it belongs to the running event loop."""
        if self._is_closed:
            raise RuntimeError("the client is closed")
        if self._opened is None:
            settings, credentials = self._connection, self._connection.credentials()
            if credentials is None:
                self._opened = grpc.aio.insecure_channel(settings.target, options=settings.options())
            else:
                self._opened = grpc.aio.secure_channel(settings.target, credentials, options=settings.options())
        return self._opened

    def _stub(self) -> gateway_pb2_grpc.GatewayServiceAsyncStub:
        return gateway_pb2_grpc.GatewayServiceStub(self._channel())

    async def _default_model(self, deadline: Deadline) -> str:
        if self._model is None:
            self._model = sole_model(await self._models(deadline, {}))
        return self._model

    async def _models(self, deadline: Deadline, options: CallOptions) -> tuple[Model, ...]:
        request = gateway_pb2.ListModelsRequest()
        return wire.models_of(await self._unary(self._stub().ListModels, request, deadline, options))

    async def _unary(
        self, method: Callable[..., Awaitable[_Answer]], request: object, deadline: Deadline, options: CallOptions
    ) -> _Answer:
        metadata = self._connection.metadata_of(options.get("metadata") or {})
        try:
            return await method(request, timeout=deadline.remaining_s(), metadata=metadata)
        except grpc.RpcError as error:
            raise error_of(cast("EndedCall", error), self.target, deadline.timeout_s) from error
        except asyncio.CancelledError:
            if task_is_cancelled():
                raise
            raise cancelled_on_the_way(self.target, has_begun=False) from None
