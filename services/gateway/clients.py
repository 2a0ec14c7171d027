"""The gateway's calls to other services, and the only place that knows their messages: tokenizer and workers.

Both go through Envoy; which worker answers is the mesh's choice. `Workers.generate` is the one place that decides what
a broken stream means: another attempt, or a typed error.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import asdict, dataclass
from typing import TypeAlias, TypeVar

import grpc
from autoglm.sparse_inference.v1 import sparse_inference_pb2 as worker_pb
from autoglm.sparse_inference.v1 import sparse_inference_pb2_grpc as worker_rpc
from autoglm.tokenizer.v1 import tokenizer_pb2 as tokenizer_pb
from autoglm.tokenizer.v1 import tokenizer_pb2_grpc as tokenizer_rpc
from autoglm.type.v1 import generation_pb2 as type_pb

from services.chassis import telemetry
from services.chassis.errors import (
    Internal,
    Interrupted,
    OutOfTime,
    ServiceError,
    Unavailable,
    WrongVariant,
    from_rpc,
)
from services.gateway.events import Reason
from services.gateway.models import Model
from services.gateway.requests import Message, Sampling
from services.gateway.work import Decoded, Encoded, End, Part, Scored, Tokens, Work

log = logging.getLogger("autoglm.gateway.clients")

T = TypeVar("T")
_Outgoing: TypeAlias = "asyncio.Queue[tokenizer_pb.DecodeStreamRequest | None]"

GROUPS_PER_ROUND = 64
"""Groups written to a decoder before its answers are read: few enough that neither side's window can fill up."""

_RETRYABLE = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED}
_RETRYABLE_FROM_PROXY = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}
_REASONS: dict[int, Reason] = {type_pb.FINISH_REASON_STOP: "stop", type_pb.FINISH_REASON_LENGTH: "length"}


class Tokenizer:
    """Text to ids and back. Remembers the bytes of at most `remembered` tokens, for log-probability alternatives."""

    def __init__(self, channel: grpc.aio.Channel, timeout_s: float, remembered: int) -> None:
        self._stub: tokenizer_rpc.TokenizerServiceAsyncStub = tokenizer_rpc.TokenizerServiceStub(channel)
        self._timeout_s, self._remembered = timeout_s, remembered
        self._bytes: dict[tuple[str, int], bytes] = {}

    async def encode(self, model: str, text: str, parse_special_tokens: bool) -> Encoded:
        request = tokenizer_pb.EncodeRequest(model=model, text=text, add_special_tokens=True)
        request.parse_special_tokens = parse_special_tokens
        answer = await _answer(self._stub.Encode(request, timeout=self._timeout_s), "tokenizer")
        return Encoded(tuple(answer.token_ids), answer.tokenizer_digest)

    async def render(self, model: str, messages: Sequence[Message]) -> Encoded:
        spoken = [tokenizer_pb.ChatMessage(role=said.role, content=said.content, name=said.name) for said in messages]
        request = tokenizer_pb.RenderChatRequest(model=model, messages=spoken, add_generation_prompt=True)
        answer = await _answer(self._stub.RenderChat(request, timeout=self._timeout_s), "tokenizer")
        return Encoded(tuple(answer.token_ids), answer.tokenizer_digest)

    async def token_bytes(self, model: str, tokenizer_digest: str, token_ids: Sequence[int]) -> dict[int, bytes]:
        """The bytes of each of `token_ids`."""
        wanted = dict.fromkeys(token_ids)
        known = {i: self._bytes[tokenizer_digest, i] for i in wanted if (tokenizer_digest, i) in self._bytes}
        if missing := [token_id for token_id in wanted if token_id not in known]:
            request = tokenizer_pb.DecodeRequest(model=model, token_ids=missing)
            request.keep_special_tokens = request.with_token_bytes = True
            answer = await _answer(self._stub.Decode(request, timeout=self._timeout_s), "tokenizer")
            for token_id, content in zip(missing, answer.token_bytes, strict=True):
                known[token_id] = self._bytes[tokenizer_digest, token_id] = content
            while len(self._bytes) > self._remembered:
                del self._bytes[next(iter(self._bytes))]
        return known

    async def ping(self, timeout_s: float) -> None:
        """Returns if a tokenizer answers in time."""
        await _answer(self._stub.ListTokenizers(tokenizer_pb.ListTokenizersRequest(), timeout=timeout_s), "tokenizer")

    @asynccontextmanager
    async def decoder(self, model: str) -> AsyncIterator[Decoder]:
        """A stream that turns one choice's ids into text; cancelled when the block is left."""
        outgoing: _Outgoing = asyncio.Queue()

        async def requests() -> AsyncIterator[tokenizer_pb.DecodeStreamRequest]:
            while (request := await outgoing.get()) is not None:
                yield request

        call = self._stub.DecodeStream(requests())
        try:
            yield Decoder(model, outgoing, aiter(call))
        finally:
            call.cancel()
            outgoing.put_nowait(None)  # else `requests` waits for ever, and asyncio complains when it is collected


class Decoder:
    """One decoding stream. The queue needs no bound of its own: a round writes at most GROUPS_PER_ROUND, then reads."""

    def __init__(
        self, model: str, outgoing: _Outgoing, answers: AsyncIterator[tokenizer_pb.DecodeStreamResponse]
    ) -> None:
        self._model, self._outgoing, self._answers = model, outgoing, answers
        self._is_open, self._decoded = False, 0

    async def decode(self, groups: Sequence[Sequence[int]]) -> list[Decoded]:
        """For each group of ids the text it made certain, in order."""
        decoded: list[Decoded] = []
        for start in range(0, len(groups), GROUPS_PER_ROUND):
            some = groups[start : start + GROUPS_PER_ROUND]
            for group in some:
                request = tokenizer_pb.DecodeStreamRequest(token_ids=group)
                if not self._is_open:
                    self._is_open, request.model, request.with_token_bytes = True, self._model, True
                self._outgoing.put_nowait(request)
            decoded.extend([await self._answer() for _ in some])
        return decoded

    async def finish(self) -> str:
        """The text that was held back because its last character was incomplete. The last call."""
        if not self._is_open:
            return ""
        self._outgoing.put_nowait(None)
        return (await self._answer()).text

    async def _answer(self) -> Decoded:
        try:
            answer = await anext(self._answers)
        except StopAsyncIteration:
            raise _interrupted(Unavailable("the tokenizer ended its stream early"), self._decoded) from None
        except grpc.aio.AioRpcError as error:
            raise _interrupted(_failure(error, "tokenizer"), self._decoded) from error
        self._decoded += len(answer.token_bytes)
        return Decoded(answer.text, tuple(answer.token_bytes))


class Workers:
    """The inference workers behind the mesh's one name for them."""

    def __init__(self, channel: grpc.aio.Channel, timeout_s: float, retries: int) -> None:
        self._stub: worker_rpc.SparseInferenceServiceAsyncStub = worker_rpc.SparseInferenceServiceStub(channel)
        self._timeout_s, self._retries = timeout_s, retries

    async def describe(self, timeout_s: float | None = None) -> Model:
        """The model, as the worker that the mesh picks describes it."""
        request = worker_pb.GetModelInfoRequest()
        info = await _answer(self._stub.GetModelInfo(request, timeout=timeout_s or self._timeout_s), "worker")
        return Model(info.model, info.variant_digest, info.tokenizer_digest, info.context_tokens, info.parameters)

    async def generate(self, work: Work) -> AsyncGenerator[Part, None]:
        """The choice's tokens and then its End; or a ServiceError, Interrupted once tokens have come.

        Before its first token a failed attempt is made again, at most `retries` times. An exact resume after that
        belongs here too: the next attempt's prompt is `work.token_ids` and the ids received so far.
        """
        received = 0
        for attempts_left in range(self._retries, -1, -1):
            try:
                async with aclosing(self._attempt(work)) as parts:
                    async for part in parts:
                        if isinstance(part, Tokens):
                            received += len(part.token_ids)
                        yield part
                return
            except _Broken as broken:
                if received or not (broken.is_retryable and attempts_left):
                    raise _interrupted(broken.error, received) from broken
                telemetry.fallback("generate_retried", request_id=work.request_id, cause=type(broken.error).__name__)

    async def _attempt(self, work: Work) -> AsyncGenerator[Part, None]:
        call = self._stub.Generate(_to_wire(work))
        digest, position = "", None
        try:
            async for message in call:
                if digest and message.variant_digest != digest:
                    raise _Broken(WrongVariant("the variant changed within a stream", expected=digest), False)
                digest = message.variant_digest
                match message.WhichOneof("event"):
                    case "chunk":
                        chunk = message.chunk
                        if position is not None and chunk.first_position != position:
                            raise _Broken(Unavailable("the worker skipped or repeated tokens"), False)
                        position = chunk.first_position + len(chunk.token_ids)
                        scores = tuple(_scored(entry) for entry in chunk.logprobs)
                        yield Tokens(digest, tuple(chunk.token_ids), scores, chunk.cached_tokens)
                    case "finish":
                        if (reason := _REASONS.get(message.finish.reason)) is None:
                            break  # handed over by a draining worker: unfinished, like a stream that just ends
                        usage = message.finish.usage
                        yield End(digest, reason, usage.cached_tokens, usage.completion_tokens)
                        return
            raise _Broken(Unavailable("the worker ended the stream without finishing it"), True)
        except grpc.aio.AioRpcError as error:
            raise _Broken(_failure(error, "worker"), _is_retryable(error)) from error
        finally:
            call.cancel()


@dataclass
class _Broken(Exception):
    """An attempt that did not reach its finish."""

    error: ServiceError
    is_retryable: bool


def _is_retryable(error: grpc.aio.AioRpcError) -> bool:
    """Whether another worker may do better. INTERNAL is a bug, unless a proxy or its picker says it for a worker."""
    return error.code() in _RETRYABLE or (error.code() in _RETRYABLE_FROM_PROXY and not _is_ours(error))


def _is_ours(error: grpc.aio.AioRpcError) -> bool:
    """Whether a service of the mesh chose this status and its words, rather than a proxy or gRPC itself."""
    trailers: dict[str, object] = dict(error.trailing_metadata() or ())  # type: ignore[arg-type]  # pairs at run time
    return "autoglm-reason" in trailers


def _failure(error: grpc.aio.AioRpcError, peer: str) -> ServiceError:
    """What a failed call means. Words that no service chose may name addresses: they go to the log, not to callers."""
    failure = from_rpc(error)
    if _is_ours(error) or not isinstance(failure, Unavailable | Internal):
        return failure
    code = error.code().name
    log.warning("a peer failed", extra={"facts": {"peer": peer, "code": code, "details": error.details()}})
    return type(failure)(f"the {peer} did not answer ({code})", code=code)


def _interrupted(error: ServiceError, received: int) -> ServiceError:
    """What a broken stream means after `received` tokens; before the first one, what it says itself."""
    if not received:
        return error
    if isinstance(error, OutOfTime):
        return OutOfTime(f"the deadline passed after {received} tokens", tokens=received)
    cause = type(error).__name__
    return Interrupted(f"the stream broke after {received} tokens: {error.message}", tokens=received, cause=cause)


async def _answer(call: Awaitable[T], peer: str) -> T:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise _failure(error, peer) from error


def _scored(entry: worker_pb.PositionLogprobs) -> Scored:
    return Scored(entry.chosen.logprob, tuple((other.token_id, other.logprob) for other in entry.top))


def _to_wire(work: Work) -> worker_pb.GenerateRequest:
    request = worker_pb.GenerateRequest(
        request_id=work.request_id,
        model=work.model,
        token_ids=work.token_ids,
        sampling=_sampling(work.sampling),
        max_tokens=work.max_tokens,
        ignore_eos=work.ignore_eos,
        logprobs=work.logprobs,
        top_logprobs=work.top_logprobs,
        tenant=work.tenant,
        choice_index=work.choice_index,
        min_tokens=work.min_tokens,
    )
    if work.constraint is not None:
        setattr(request, work.constraint.kind, work.constraint.text)
    return request


def _sampling(sampling: Sampling) -> type_pb.SamplingParams:
    fields = asdict(sampling)
    bias = [type_pb.LogitBias(token_id=token_id, bias=amount) for token_id, amount in fields.pop("logit_bias")]
    return type_pb.SamplingParams(**fields, logit_bias=bias)
