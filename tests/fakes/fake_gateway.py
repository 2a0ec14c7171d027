"""A real gRPC server that speaks GatewayService from a script, so that clients can be tested without a model.

Every generation plays the next script, or the default one: the prompt's words, back, one delta each. What was asked
is kept in `requests` and `metadata`; `started` and `cancelled` are events to wait for.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import grpc
from autoglm.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from autoglm.type.v1 import generation_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from services.chassis.errors import ServiceError, status_of

DIGEST = "sha256:" + "ab" * 32
REQUEST_ID, TRACE_ID = "req-1", "0af7651916cd43dd8448eb211c80319c"
REASONS = {"stop": generation_pb2.FINISH_REASON_STOP, "length": generation_pb2.FINISH_REASON_LENGTH}


@dataclass(frozen=True, slots=True)
class Wait:
    """Goes on when the event is set."""

    event: asyncio.Event


@dataclass(frozen=True, slots=True)
class Abort:
    """Ends the call with a bare status, as a proxy would."""

    code: grpc.StatusCode
    text: str = ""


Step: TypeAlias = gateway_pb2.GenerateResponse | ServiceError | Wait | Abort


def delta(text: str, choice: int = 0, tokens: tuple[gateway_pb2.TokenText, ...] = ()) -> gateway_pb2.GenerateResponse:
    """More text."""
    return _response(delta=gateway_pb2.TextDelta(choice=choice, text=text, tokens=tokens))


def finish(reason: str = "stop", choice: int = 0, stop: str = "") -> gateway_pb2.GenerateResponse:
    """The end of a choice."""
    return _response(finish=gateway_pb2.ChoiceFinish(choice=choice, reason=REASONS[reason], stop=stop))


def usage(prompt: int = 3, completion: int = 2, cached: int = 1) -> gateway_pb2.GenerateResponse:
    """The counts that close a stream."""
    counts = generation_pb2.Usage(prompt_tokens=prompt, completion_tokens=completion, cached_tokens=cached)
    return _response(usage=counts)


def forever() -> Wait:
    """Never goes on; only a cancellation ends it."""
    return Wait(asyncio.Event())


class FakeGateway(gateway_pb2_grpc.GatewayServiceServicer):
    """Use as `async with FakeGateway() as gateway:` and connect to `gateway.target`."""

    def __init__(self) -> None:
        self.models = [
            gateway_pb2.Model(
                name="glm-tiny", variant_digest=DIGEST, context_tokens=2048, parameters=7, created_unix_s=1
            )
        ]
        self.requests: list[gateway_pb2.GenerateRequest] = []
        self.metadata: list[dict[str, Any]] = []
        self.remaining_s: list[float | None] = []
        self.failure: ServiceError | Abort | None = None
        """What CountTokens and ListModels answer with, when set."""
        self.started = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.health = health.aio.HealthServicer()
        self._scripts: deque[tuple[Step, ...]] = deque()
        self._server = grpc.aio.server()
        gateway_pb2_grpc.add_GatewayServiceServicer_to_server(self, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        self.target = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def script(self, *steps: Step) -> None:
        """What the next generation does. Without `usage` and `finish` the stream is cut short on purpose."""
        self._scripts.append(steps)

    async def __aenter__(self) -> Self:
        await self.health.set("autoglm.gateway.v1.GatewayService", health_pb2.HealthCheckResponse.SERVING)
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Ends the server at once, calls under way included."""
        await self._server.stop(None)

    async def Generate(  # type: ignore[override]  # the stub's type covers sync servers as well
        self, request: gateway_pb2.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[gateway_pb2.GenerateResponse]:
        """Plays a script."""
        self.requests.append(request)
        self._note(context)
        await context.send_initial_metadata((("x-trace-id", TRACE_ID), ("x-request-id", REQUEST_ID)))
        self.started.set()
        try:
            for step in self._scripts.popleft() if self._scripts else _echo(request):
                if isinstance(step, gateway_pb2.GenerateResponse):
                    yield step
                elif isinstance(step, Wait):
                    await step.event.wait()
                else:
                    await _abort(context, step)
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            raise

    async def CountTokens(  # type: ignore[override]  # as above
        self, request: gateway_pb2.CountTokensRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> gateway_pb2.CountTokensResponse:
        """One token per word."""
        self._note(context)
        if self.failure is not None:
            await _abort(context, self.failure)
        texts = [request.text] if request.HasField("text") else [turn.content for turn in request.chat.messages]
        return gateway_pb2.CountTokensResponse(tokens=sum(len(text.split()) for text in texts), tokenizer_digest=DIGEST)

    async def ListModels(  # type: ignore[override]  # as above
        self, request: gateway_pb2.ListModelsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> gateway_pb2.ListModelsResponse:
        """The models."""
        self._note(context)
        if self.failure is not None:
            await _abort(context, self.failure)
        return gateway_pb2.ListModelsResponse(models=self.models)

    def _note(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        self.metadata.append(dict(context.invocation_metadata() or ()))  # type: ignore[arg-type]  # pairs at run time
        self.remaining_s.append(context.time_remaining())


def _echo(request: gateway_pb2.GenerateRequest) -> tuple[Step, ...]:
    text = request.chat.messages[-1].content if request.HasField("chat") else request.text
    words, choices = text.split(), range(max(request.choices, 1))
    deltas = [
        delta(word if index == 0 else f" {word}", choice) for index, word in enumerate(words) for choice in choices
    ]
    return (*deltas, *(finish(choice=choice) for choice in choices), usage(len(words), len(words) * len(choices), 0))


def _response(**event: Any) -> gateway_pb2.GenerateResponse:
    return gateway_pb2.GenerateResponse(request_id=REQUEST_ID, variant_digest=DIGEST, **event)


async def _abort(context: grpc.aio.ServicerContext[Any, Any], step: ServiceError | Abort) -> None:
    if isinstance(step, Abort):
        await context.abort(step.code, step.text)
    else:
        code, text, trailers = status_of(step)
        await context.abort(code, text, (*trailers, ("x-request-id", REQUEST_ID)))
