"""The gateway's public gRPC face: turns messages into the core's words and events back into messages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, TypeAlias

import grpc
from autoglm.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from autoglm.type.v1 import generation_pb2
from opentelemetry import trace

from services.chassis import deadlines
from services.chassis.errors import InvalidRequest
from services.gateway.budgets.bucket import Standing
from services.gateway.budgets.reservations import OverBudget
from services.gateway.budgets.words import spoken
from services.gateway.events import Delta, Event, Finished, TokenText, Usage
from services.gateway.generation import Gateway
from services.gateway.requests import Chat, Constraint, Ids, Message, Prompt, Request, Sampling, Text
from services.gateway.tenancy import TENANT_HEADER, tenant_of

SERVICE_NAME: str = gateway_pb2.DESCRIPTOR.services_by_name["GatewayService"].full_name

READER_GRACE_S = 1.0
"""A client that stops reading is cut this long after its deadline."""

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_REASONS = {"stop": generation_pb2.FINISH_REASON_STOP, "length": generation_pb2.FINISH_REASON_LENGTH}
_SCALARS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
)


class GatewayServicer(gateway_pb2_grpc.GatewayServiceServicer):
    """`new_id` names each request; the name and the trace id also go into the trailing metadata."""

    def __init__(self, gateway: Gateway, new_id: Callable[[], str]) -> None:
        self._gateway, self._new_id = gateway, new_id

    async def Generate(
        self, request: gateway_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[gateway_pb2.GenerateResponse]:
        request_id = self._new_id()
        _identify(context, request_id)
        if deadlines.remaining_s() is None:
            deadlines.start(self._gateway.settings.default_deadline_s)
        tenant = _tenant(context, self._gateway.settings.tenant)
        generation = self._gateway.generate(_request(request), request_id, tenant)
        context.add_done_callback(lambda _: generation.close())  # type: ignore[arg-type]  # the stub wants a protocol class
        left = deadlines.remaining_s()
        async with asyncio.timeout(None if left is None else left + READER_GRACE_S), generation:
            try:
                async for event in generation:
                    yield _response(request_id, event)
                    if isinstance(event, Usage):
                        _identify(context, request_id, generation.standing)
            except OverBudget as refusal:
                _identify(context, request_id, refusal.standing)
                raise

    async def CountTokens(
        self, request: gateway_pb2.CountTokensRequest, context: Context
    ) -> gateway_pb2.CountTokensResponse:
        _identify(context, self._new_id())
        model = await self._gateway.catalogue.get(request.model)
        prompt = _prompt(request)
        encoded = await self._gateway.encode(model, prompt)
        return gateway_pb2.CountTokensResponse(tokens=len(encoded.token_ids), tokenizer_digest=encoded.tokenizer_digest)

    async def ListModels(
        self, request: gateway_pb2.ListModelsRequest, context: Context
    ) -> gateway_pb2.ListModelsResponse:
        _identify(context, self._new_id())
        return gateway_pb2.ListModelsResponse(
            models=[
                gateway_pb2.Model(
                    name=model.name,
                    variant_digest=model.variant_digest,
                    context_tokens=model.context_tokens,
                    parameters=model.parameters,
                    created_unix_s=model.created_unix_s,
                )
                for model in await self._gateway.catalogue.all()
            ]
        )


def _identify(context: Context, request_id: str, standing: Standing | None = None) -> None:
    trace_id = trace.get_current_span().get_span_context().trace_id
    names = ("x-request-id", request_id), ("x-trace-id", f"{trace_id:032x}")
    context.set_trailing_metadata((*names, *spoken(standing).items()))


def _tenant(context: Context, default: str) -> str:
    pairs: Iterable[Any] = context.invocation_metadata() or ()
    return tenant_of([str(value) for key, value in pairs if key == TENANT_HEADER], default)


def _request(message: gateway_pb2.GenerateRequest) -> Request:
    return Request(
        model=message.model,
        prompts=(_prompt(message),),
        sampling=_sampling(message.sampling),
        max_tokens=message.max_tokens,
        stop=tuple(message.stop),
        choices=message.choices or 1,
        logprobs=message.logprobs,
        top_logprobs=message.top_logprobs,
        ignore_eos=message.ignore_eos,
        min_tokens=message.min_tokens,
        constraint=_constraint(message),
    )


def _prompt(message: gateway_pb2.GenerateRequest | gateway_pb2.CountTokensRequest) -> Prompt:
    match message.WhichOneof("prompt"):
        case "text":
            return Text(message.text)
        case "chat":
            return Chat(tuple(Message(said.role, said.content) for said in message.chat.messages))
        case "token_ids" if isinstance(message, gateway_pb2.GenerateRequest):
            return Ids(tuple(message.token_ids.token_ids))
    raise InvalidRequest("the request has no prompt: set text, chat or token_ids", field="prompt")


def _constraint(message: gateway_pb2.GenerateRequest) -> Constraint | None:
    match message.WhichOneof("constraint"):
        case "json_schema":
            return Constraint("json_schema", message.json_schema)
        case "regex":
            return Constraint("regex", message.regex)
        case "grammar":
            return Constraint("grammar", message.grammar)
    return None


def _sampling(message: generation_pb2.SamplingParams) -> Sampling:
    given = {name: getattr(message, name) for name in _SCALARS if message.HasField(name)}  # type: ignore[arg-type]  # names of optional fields
    return Sampling(**given, logit_bias=tuple((entry.token_id, entry.bias) for entry in message.logit_bias))


def _response(request_id: str, event: Event) -> gateway_pb2.GenerateResponse:
    response = gateway_pb2.GenerateResponse(request_id=request_id, variant_digest=event.variant_digest)
    match event:
        case Delta():
            response.delta.choice, response.delta.text = event.choice, event.text
            response.delta.tokens.extend(_token(token) for token in event.tokens)
        case Finished():
            response.finish.choice, response.finish.stop = event.choice, event.stop
            response.finish.reason = _REASONS[event.reason]
        case Usage():
            response.usage.prompt_tokens, response.usage.cached_tokens = event.prompt_tokens, event.cached_tokens
            response.usage.completion_tokens = event.completion_tokens
    return response


def _token(token: TokenText) -> gateway_pb2.TokenText:
    return gateway_pb2.TokenText(
        token_id=token.token_id,
        content=token.content,
        logprob=token.logprob,
        top=[
            gateway_pb2.Alternative(token_id=other.token_id, content=other.content, logprob=other.logprob)
            for other in token.top
        ],
    )
