"""The gateway's calls to other services, and the only place that knows their messages: tokenizer and workers.

Both go through Envoy; which worker answers is the mesh's choice. `Workers.generate` is the one place that decides what
a broken stream means: another attempt, or a typed error.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from typing import TypeVar

import grpc
from autoglm.sparse_inference.v1 import sparse_inference_pb2 as worker_pb
from autoglm.sparse_inference.v1 import sparse_inference_pb2_grpc as worker_rpc
from autoglm.tokenizer.v1 import tokenizer_pb2 as tokenizer_pb
from autoglm.tokenizer.v1 import tokenizer_pb2_grpc as tokenizer_rpc
from autoglm.type.v1 import generation_pb2 as type_pb

from services.chassis import telemetry
from services.chassis.decoding import Spelling
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
from services.gateway.models import Model, check_tokenizer
from services.gateway.requests import Message, Sampling
from services.gateway.work import Encoded, End, Part, Scored, Tokens, Work

log = logging.getLogger("autoglm.gateway.clients")

T = TypeVar("T")

ASKED = "x-autoglm-asked-bin"
MAX_TOKENS = 2_000_000
"""Largest vocabulary held."""

_RETRYABLE = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED}
_RETRYABLE_FROM_PROXY = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}
_REASONS: dict[int, Reason] = {type_pb.FINISH_REASON_STOP: "stop", type_pb.FINISH_REASON_LENGTH: "length"}


class Tokenizer:
    """Text to ids, and the spelling that turns ids back into text here; the `remembered` last used ones are kept."""

    def __init__(self, channel: grpc.aio.Channel, timeout_s: float, remembered: int) -> None:
        self._stub: tokenizer_rpc.TokenizerServiceAsyncStub = tokenizer_rpc.TokenizerServiceStub(channel)
        self._timeout_s, self._remembered = timeout_s, remembered
        self._spellings: dict[str, Spelling] = {}
        self._asking = asyncio.Lock()

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

    async def spelling(self, model: Model) -> Spelling:
        """The bytes behind the model's tokens: asked for once per tokenizer digest. Raises WrongVariant for another."""
        if (found := self._spellings.get(model.tokenizer_digest)) is None:
            async with self._asking:
                found = self._spellings.get(model.tokenizer_digest)
                if found is None:
                    found = await self._fetch(model)
        self._spellings.pop(found.digest, None)
        self._spellings[found.digest] = found  # the last used comes last
        while len(self._spellings) > self._remembered:
            del self._spellings[next(iter(self._spellings))]
        return found

    async def ping(self, timeout_s: float) -> None:
        """Returns if a tokenizer answers in time."""
        await _answer(self._stub.ListTokenizers(tokenizer_pb.ListTokenizersRequest(), timeout=timeout_s), "tokenizer")

    async def _fetch(self, model: Model) -> Spelling:
        pieces: list[bytes | None] = []
        special_ids: set[int] = set()
        drops_space = False
        request = tokenizer_pb.GetVocabularyRequest(model=model.name)
        try:
            async for part in self._stub.GetVocabulary(request, timeout=self._timeout_s):
                check_tokenizer(model, part.tokenizer_digest)
                absent, first = frozenset(part.absent_ids), len(pieces)
                pieces += (None if i in absent else piece for i, piece in enumerate(part.token_bytes, first))
                special_ids.update(part.special_ids)
                drops_space = part.drops_leading_space
                if len(pieces) > MAX_TOKENS:
                    raise Internal(f"the tokenizer tells of more than {MAX_TOKENS} tokens")
        except grpc.aio.AioRpcError as error:
            raise _failure(error, "tokenizer") from error
        return Spelling(model.tokenizer_digest, pieces, frozenset(special_ids), drops_space)


class Workers:
    """The inference workers behind the mesh's one name for them."""

    def __init__(self, channel: grpc.aio.Channel, timeout_s: float, retries: int, header_bytes: int) -> None:
        self._stub: worker_rpc.SparseInferenceServiceAsyncStub = worker_rpc.SparseInferenceServiceStub(channel)
        self._timeout_s, self._retries, self._header_bytes = timeout_s, retries, header_bytes

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
        call = self._stub.Generate(_to_wire(work), metadata=self._asked(work))
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

    def _asked(self, work: Work) -> tuple[tuple[str, bytes], ...]:
        """The header that says to the mesh's picker what it would else read in the body; none for a long prompt."""
        if len(work.token_ids) > self._header_bytes:  # an id takes a byte at least
            return ()
        asked = worker_pb.GenerateRequest(
            request_id=work.request_id,
            model=work.model,
            token_ids=work.token_ids,
            max_tokens=work.max_tokens,
            tenant=work.tenant,
        )
        if asked.ByteSize() > self._header_bytes:
            return ()
        return ((ASKED, asked.SerializeToString()),)


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
