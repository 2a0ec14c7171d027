"""The gateway's neighbours as one real gRPC server that a test scripts: tokenizer, worker and trace collector.

The tokenizer is byte-level (token id = byte), so characters of several bytes are split over tokens. The worker plays
scripts: each call takes the next one, the last is kept. What was asked and how each call ended can be awaited.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import grpc
from autoglm.sparse_inference.v1 import sparse_inference_pb2 as worker_pb
from autoglm.sparse_inference.v1 import sparse_inference_pb2_grpc as worker_rpc
from autoglm.tokenizer.v1 import tokenizer_pb2 as tokenizer_pb
from autoglm.tokenizer.v1 import tokenizer_pb2_grpc as tokenizer_rpc
from autoglm.type.v1 import generation_pb2 as type_pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span

MODEL, VARIANT, TOKENIZER = "glm-tiny", "sha256:" + "ab" * 32, "sha256:" + "cd" * 32
BOS, USER, VOCABULARY = 256, 257, 260
CONTEXT_TOKENS = 128

STOP, LENGTH = type_pb.FINISH_REASON_STOP, type_pb.FINISH_REASON_LENGTH
HANDED_OVER = type_pb.FINISH_REASON_HANDED_OVER

Script = Callable[["WorkerCall"], AsyncIterator[worker_pb.GenerateResponse]]


@dataclass
class WorkerCall:
    """One Generate call as the worker sees it."""

    request: worker_pb.GenerateRequest
    context: Any
    metadata: dict[str, Any]
    remaining_s: float | None
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    sent: int = 0  # messages that the gateway had room for
    completed: bool = False  # whether the script ran to its own end


def chunk(ids: Iterable[int], position: int, request: worker_pb.GenerateRequest) -> worker_pb.GenerateResponse:
    ids = list(ids)
    logprobs = []
    if request.logprobs:
        for token_id in ids:
            top = [
                type_pb.TokenLogprob(token_id=(token_id + rank) % 256, logprob=-0.5 - rank)
                for rank in range(request.top_logprobs)
            ]
            chosen = type_pb.TokenLogprob(token_id=token_id, logprob=-0.5)
            logprobs.append(worker_pb.PositionLogprobs(chosen=chosen, top=top))
    tokens = worker_pb.TokenChunk(token_ids=ids, logprobs=logprobs, first_position=position)
    return worker_pb.GenerateResponse(variant_digest=VARIANT, chunk=tokens)


def finish(reason: int, prompt: int, completion: int, cached: int = 0) -> worker_pb.GenerateResponse:
    usage = type_pb.Usage(prompt_tokens=prompt, cached_tokens=cached, completion_tokens=completion)
    end = worker_pb.Finish(reason=reason, usage=usage)  # type: ignore[arg-type]  # an enum value
    return worker_pb.GenerateResponse(variant_digest=VARIANT, finish=end)


def says(text: str, tokens_per_chunk: int = 1, reason: int = STOP, cached: int = 0) -> Script:
    """Says `text` and finishes."""

    async def script(call: WorkerCall) -> AsyncIterator[worker_pb.GenerateResponse]:
        ids = list(text.encode())
        for start in range(0, len(ids), tokens_per_chunk):
            yield chunk(ids[start : start + tokens_per_chunk], start, call.request)
        yield finish(reason, len(call.request.token_ids), len(ids), cached)

    return script


def hangs(text: str = "") -> Script:
    """Says `text`, then nothing until it is cancelled."""

    async def script(call: WorkerCall) -> AsyncIterator[worker_pb.GenerateResponse]:
        for position, token_id in enumerate(text.encode()):
            yield chunk([token_id], position, call.request)
        await asyncio.Event().wait()

    return script


def breaks(text: str, code: grpc.StatusCode, trailers: tuple[tuple[str, str], ...] = ()) -> Script:
    """Says `text`, then fails with `code`."""

    async def script(call: WorkerCall) -> AsyncIterator[worker_pb.GenerateResponse]:
        for position, token_id in enumerate(text.encode()):
            yield chunk([token_id], position, call.request)
        await call.context.abort(code, "the fake worker fails", trailers)

    return script


def ends_silently(text: str) -> Script:
    """Says `text` and ends the stream without a finish."""

    async def script(call: WorkerCall) -> AsyncIterator[worker_pb.GenerateResponse]:
        for position, token_id in enumerate(text.encode()):
            yield chunk([token_id], position, call.request)

    return script


def floods() -> Script:
    """Says one character for ever, as fast as it is read."""

    async def script(call: WorkerCall) -> AsyncIterator[worker_pb.GenerateResponse]:
        position = 0
        while True:
            yield chunk([65] * 64, position, call.request)
            position += 64

    return script


class Peers:
    """The server. `reset` between tests."""

    def __init__(self) -> None:
        self.server = grpc.aio.server()
        self.port = self.server.add_insecure_port("127.0.0.1:0")
        self.spans: list[Span] = []
        self.spans_came = asyncio.Condition()
        self.reset()
        worker_rpc.add_SparseInferenceServiceServicer_to_server(_Worker(self), self.server)
        tokenizer_rpc.add_TokenizerServiceServicer_to_server(_Tokenizer(self), self.server)
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(_Collector(self), self.server)  # type: ignore[no-untyped-call]

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def reset(self) -> None:
        self.scripts: list[Script] = [says("Hello, wörld!")]
        self.calls: list[WorkerCall] = []
        self.called: asyncio.Queue[WorkerCall] = asyncio.Queue()
        self.tokenizer_digest = TOKENIZER
        self.encoded = 0
        self.vocabularies = 0
        self.is_tokenizer_broken = False

    async def call(self) -> WorkerCall:
        """The next Generate call that came."""
        return await asyncio.wait_for(self.called.get(), 20)

    async def span(self, wanted: Callable[[Span], bool]) -> Span:
        """The first collected span that `wanted` accepts."""
        async with asyncio.timeout(20), self.spans_came:
            await self.spans_came.wait_for(lambda: any(map(wanted, self.spans)))
            return next(filter(wanted, self.spans))


class _Worker(worker_rpc.SparseInferenceServiceServicer):
    def __init__(self, peers: Peers) -> None:
        self.peers = peers

    async def Generate(self, request: worker_pb.GenerateRequest, context: Any) -> AsyncIterator[Any]:
        peers = self.peers
        call = WorkerCall(request, context, dict(context.invocation_metadata()), context.time_remaining())
        context.add_done_callback(lambda _: call.ended.set())
        peers.calls.append(call)
        peers.called.put_nowait(call)
        script = peers.scripts.pop(0) if len(peers.scripts) > 1 else peers.scripts[0]
        async for message in script(call):
            yield message
            call.sent += 1
        call.completed = True

    async def Score(self, request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "the fake worker does not score")

    async def GetLoad(self, request: Any, context: Any) -> worker_pb.GetLoadResponse:
        return worker_pb.GetLoadResponse(running=len(self.peers.calls))

    async def GetModelInfo(self, request: Any, context: Any) -> worker_pb.GetModelInfoResponse:
        return worker_pb.GetModelInfoResponse(
            model=MODEL, variant_digest=VARIANT, tokenizer_digest=TOKENIZER, vocabulary_size=VOCABULARY,
            context_tokens=CONTEXT_TOKENS, block_tokens=16, parameters=1234,
        )  # fmt: skip


class _Tokenizer(tokenizer_rpc.TokenizerServiceServicer):
    def __init__(self, peers: Peers) -> None:
        self.peers = peers

    async def Encode(self, request: tokenizer_pb.EncodeRequest, context: Any) -> tokenizer_pb.EncodeResponse:
        self.peers.encoded += 1
        if self.peers.is_tokenizer_broken:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the fake tokenizer fails")
        prefix = [BOS] if request.add_special_tokens else []
        ids = [*prefix, *request.text.encode()]
        return tokenizer_pb.EncodeResponse(token_ids=ids, tokenizer_digest=self.peers.tokenizer_digest)

    async def RenderChat(self, request: tokenizer_pb.RenderChatRequest, context: Any) -> Any:
        self.peers.encoded += 1
        text = "".join(f"{message.role}:{message.content}\n" for message in request.messages)
        return tokenizer_pb.RenderChatResponse(
            text=text, token_ids=[USER, *text.encode()], tokenizer_digest=self.peers.tokenizer_digest
        )

    async def GetVocabulary(self, request: Any, context: Any) -> AsyncIterator[tokenizer_pb.GetVocabularyResponse]:
        self.peers.vocabularies += 1
        digest = self.peers.tokenizer_digest
        yield tokenizer_pb.GetVocabularyResponse(
            tokenizer_digest=digest, token_bytes=[bytes([byte]) for byte in range(256)]
        )
        if self.peers.is_tokenizer_broken:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the fake tokenizer fails")
        special = range(256, VOCABULARY - 1)
        pieces = [*(b"<|%d|>" % token_id for token_id in special), b""]
        yield tokenizer_pb.GetVocabularyResponse(
            tokenizer_digest=digest, token_bytes=pieces, special_ids=special, absent_ids=[VOCABULARY - 1]
        )

    async def ListTokenizers(self, request: Any, context: Any) -> tokenizer_pb.ListTokenizersResponse:
        info = tokenizer_pb.TokenizerInfo(model=MODEL, tokenizer_digest=TOKENIZER, vocabulary_size=VOCABULARY)
        return tokenizer_pb.ListTokenizersResponse(tokenizers=[info])


class _Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self, peers: Peers) -> None:
        self.peers = peers

    async def Export(self, request: Any, context: Any) -> Any:
        async with self.peers.spans_came:
            self.peers.spans.extend(
                span for resource in request.resource_spans for scope in resource.scope_spans for span in scope.spans
            )
            self.peers.spans_came.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()
