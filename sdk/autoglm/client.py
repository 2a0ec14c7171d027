"""The synchronous client.

Calls may be made from several threads at once. The wire is gRPC; what is sent and received is in `autoglm.requests`
and `autoglm.assembly`, what goes wrong in `autoglm.statuses`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack, cast

import grpc

from autoglm import wire
from autoglm.assembly import Assembly
from autoglm.completion import Completion, Health, Model, TokenCount
from autoglm.connection import DEFAULT_MAX_ANSWER_BYTES, DEFAULT_TIMEOUT_S, Connection, Tls, connection
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
from autoglm.statuses import EndedCall, error_of
from autoglm.streams import Stream

_Answer = TypeVar("_Answer")


class Client:
    """A client of the mesh.

        with Client() as client:                                     # 127.0.0.1:8080, or AUTOGLM_TARGET
            print(client.generate("Once upon a time").text)
            with client.stream("Once upon a time", max_tokens=64) as stream:
                for event in stream:
                    if isinstance(event, Delta):
                        print(event.text, end="", flush=True)

    `target` is host:port, http(s)://host[:port] or any gRPC name; `tls` is True or a `Tls`; `token` becomes a bearer
    token (or AUTOGLM_TOKEN); `timeout` is the default of every call in seconds; `model` (or AUTOGLM_MODEL) the default
    model. Calls are not retried: the mesh does that where it is safe. Connects at the first call.
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
        self._channel = _open(self._connection)
        self._stub = gateway_pb2_grpc.GatewayServiceStub(self._channel)
        self._model = self._connection.model
        self._is_closed = False

    @property
    def target(self) -> str:
        """Where this client connects."""
        return self._connection.target

    def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        token_ids: Iterable[int] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Completion:
        """Generates and waits for the whole answer. Give one of `prompt`, `messages` or `token_ids`.

            client.generate("2 + 2 =", max_tokens=8, temperature=0).text
            client.generate("A name for a cat:", n=3, seed=7).choices

        All options are in `GenerateOptions`. Raises the errors of `autoglm.errors`.
        """
        with self.stream(prompt, messages=messages, token_ids=token_ids, **options) as stream:
            return stream.result()

    def chat(
        self, message: str | Messages, *, system: str | None = None, **options: Unpack[GenerateOptions]
    ) -> Completion:
        """Answers a conversation: a string is one user message, a list is the whole talk so far.

        client.chat("Tell me a story.", system="You speak to children.").text
        """
        return self.generate(messages=conversation(message, system), **options)

    def stream(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        token_ids: Iterable[int] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Stream:
        """Starts to generate and returns the events as they come: `Delta`, one `Finish` per choice, then `Done`.

        Use it in a `with` block, so that leaving early cancels the call.
        """
        request = generate_request(prompt, messages, token_ids, options)
        deadline = Deadline(timeout_of(options, self._connection.timeout_s))
        set_model(request, options.get("model") or self._default_model(deadline))
        call = self._open_call(self._stub.Generate, request, deadline, options)

        def fail(ended: EndedCall, assembly: Assembly) -> AutoglmError:
            return error_of(ended, self.target, deadline.timeout_s, has_begun=assembly.has_begun)

        return Stream(call, Assembly(request.choices, self._connection.max_answer_bytes), request.model, fail)

    def count_tokens(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        model: str | None = None,
        **options: Unpack[CallOptions],
    ) -> TokenCount:
        """How many tokens a prompt takes, the model's own prefix included: `client.count_tokens("Hello").tokens`."""
        check_names(options, CallOptions.__optional_keys__)
        request = count_request(prompt, messages)
        deadline = Deadline(timeout_of(options, self._connection.timeout_s))
        set_model(request, model or self._default_model(deadline))
        return wire.count_of(self._unary(self._stub.CountTokens, request, deadline, options))

    def models(self, **options: Unpack[CallOptions]) -> tuple[Model, ...]:
        """The models that can be asked for."""
        check_names(options, CallOptions.__optional_keys__)
        return self._models(Deadline(timeout_of(options, self._connection.timeout_s)), options)

    def health(self, service: str = wire.GATEWAY_SERVICE, **options: Unpack[CallOptions]) -> Health:
        """Asks the gateway (grpc.health.v1) whether it serves; raises `UnavailableError` when nobody answers."""
        check_names(options, CallOptions.__optional_keys__)
        deadline = Deadline(timeout_of(options, self._connection.timeout_s))
        check: Any = self._channel.unary_unary(wire.HEALTH_METHOD)  # type: ignore[call-arg]  # bytes both ways
        started = time.monotonic()
        try:
            answer: bytes = self._unary(check, wire.health_request(service), deadline, options)
        except NotFoundError:
            return Health("service_unknown", time.monotonic() - started)
        return wire.health_of(answer, time.monotonic() - started)

    def close(self) -> None:
        """Closes the channel; calls still under way are cancelled."""
        self._is_closed = True
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client({self.target!r})"

    def _default_model(self, deadline: Deadline) -> str:
        if self._model is None:
            self._model = sole_model(self._models(deadline, {}))
        return self._model

    def _models(self, deadline: Deadline, options: CallOptions) -> tuple[Model, ...]:
        return wire.models_of(self._unary(self._stub.ListModels, gateway_pb2.ListModelsRequest(), deadline, options))

    def _unary(
        self, method: Callable[..., _Answer], request: object, deadline: Deadline, options: CallOptions
    ) -> _Answer:
        try:
            return self._open_call(method, request, deadline, options)
        except grpc.RpcError as error:
            raise error_of(cast("EndedCall", error), self.target, deadline.timeout_s) from error

    def _open_call(
        self, method: Callable[..., _Answer], request: object, deadline: Deadline, options: CallOptions
    ) -> _Answer:
        if self._is_closed:
            raise RuntimeError("the client is closed")
        metadata = self._connection.metadata_of(options.get("metadata") or {})
        return method(request, timeout=deadline.remaining_s(), metadata=metadata)


def _open(settings: Connection) -> grpc.Channel:
    credentials = settings.credentials()
    if credentials is None:
        return grpc.insecure_channel(settings.target, options=settings.options())
    return grpc.secure_channel(settings.target, credentials, options=settings.options())
