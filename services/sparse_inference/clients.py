"""The worker's outgoing calls: the cache service for blocks, the scheduler for its lease, the tokenizer for callers of
the Open Inference Protocol who bring text. Protobuf stays in here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager

import grpc
from autoglm.cache.v1 import cache_pb2, cache_pb2_grpc
from autoglm.scheduler.v1 import scheduler_pb2, scheduler_pb2_grpc
from autoglm.tokenizer.v1 import tokenizer_pb2, tokenizer_pb2_grpc

from engine.runtime.loop import Load
from services.chassis.errors import Internal, ServiceError, Unavailable, from_rpc
from services.sparse_inference.prefixes import Scope, StoredBlock
from services.sparse_inference.settings import WorkerSettings
from services.sparse_inference.worker import Worker

log = logging.getLogger("autoglm.clients")


class CacheClient:
    """`prefixes.RemoteBlocks` over gRPC."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = cache_pb2_grpc.CacheServiceStub(channel)

    async def match(self, scope: Scope, names: Sequence[bytes]) -> int:
        try:
            answer = await self._stub.Match(cache_pb2.MatchRequest(scope=_scope(scope), block_hashes=names))
        except grpc.RpcError as error:
            raise from_rpc(error) from None
        return int(answer.matched_blocks)

    async def get(self, scope: Scope, names: Sequence[bytes]) -> AsyncIterator[StoredBlock]:
        try:
            async for answer in self._stub.Get(cache_pb2.GetRequest(scope=_scope(scope), block_hashes=names)):
                yield StoredBlock(answer.block.block_hash, answer.block.payload, answer.block.checksum)
        except grpc.RpcError as error:
            raise from_rpc(error) from None

    async def put(self, scope: Scope, blocks: Sequence[StoredBlock]) -> int:
        async def requests() -> AsyncIterator[cache_pb2.PutRequest]:
            for block in blocks:
                message = cache_pb2.Block(block_hash=block.name, payload=block.payload, checksum=block.checksum)
                yield cache_pb2.PutRequest(scope=_scope(scope), block=message)

        try:
            answer = await self._stub.Put(requests())
        except grpc.RpcError as error:
            raise from_rpc(error) from None
        return int(answer.stored)


class ArtifactClient:
    """`model_fetch.Artifacts` over gRPC: a model's files by digest. No deadline: a file takes as long as it comes."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = cache_pb2_grpc.CacheServiceStub(channel)

    async def artifact(self, digest: str, offset: int) -> AsyncGenerator[tuple[bytes, int], None]:
        request = cache_pb2.GetArtifactRequest(digest=digest, offset=offset)
        try:
            async for answer in self._stub.GetArtifact(request):
                yield answer.content, answer.total_bytes
        except grpc.RpcError as error:
            raise from_rpc(error) from None


class TokenizerClient:
    """`oip_text.Texts` over gRPC: text to ids and back."""

    def __init__(self, channel: grpc.aio.Channel, timeout_s: float) -> None:
        self._stub: tokenizer_pb2_grpc.TokenizerServiceAsyncStub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
        self._timeout_s = timeout_s

    async def encode(self, model: str, text: str) -> tuple[list[int], str]:
        """The ids, the model's prefix tokens included, and the digest of the tokenizer that made them."""
        request = tokenizer_pb2.EncodeRequest(model=model, text=text, add_special_tokens=True)
        try:
            answer = await self._stub.Encode(request, timeout=self._timeout_s)
        except grpc.RpcError as error:
            raise _tokenizer_failure(error) from None
        return list(answer.token_ids), answer.tokenizer_digest

    @asynccontextmanager
    async def decoder(self, model: str) -> AsyncIterator[Decoder]:
        """Turns one generation's ids into text as they come; cancelled when the block is left."""
        outgoing: asyncio.Queue[tokenizer_pb2.DecodeStreamRequest | None] = asyncio.Queue()

        async def requests() -> AsyncIterator[tokenizer_pb2.DecodeStreamRequest]:
            while (request := await outgoing.get()) is not None:
                yield request

        call = self._stub.DecodeStream(requests())
        try:
            yield Decoder(model, outgoing, aiter(call))
        finally:
            call.cancel()
            outgoing.put_nowait(None)  # else `requests` waits for ever


class Decoder:
    """One decoding stream. A request is answered before the next is written, so the queue holds one at most."""

    def __init__(
        self,
        model: str,
        outgoing: asyncio.Queue[tokenizer_pb2.DecodeStreamRequest | None],
        answers: AsyncIterator[tokenizer_pb2.DecodeStreamResponse],
    ) -> None:
        self._model, self._outgoing, self._answers = model, outgoing, answers

    async def push(self, token_ids: Sequence[int]) -> str:
        """The text that `token_ids` made certain; never ends inside a character."""
        return await self._ask(tokenizer_pb2.DecodeStreamRequest(model=self._model, token_ids=token_ids))

    async def finish(self) -> str:
        """What was held back. The last call."""
        return await self._ask(None)

    async def _ask(self, request: tokenizer_pb2.DecodeStreamRequest | None) -> str:
        self._outgoing.put_nowait(request)
        try:
            return (await anext(self._answers)).text
        except StopAsyncIteration:
            raise Unavailable("the tokenizer ended its stream early") from None
        except grpc.RpcError as error:
            raise _tokenizer_failure(error) from None


class LeaseClient:
    """The worker's membership: one stream to the scheduler, as long as it lasts."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)

    async def hold(self, reports: AsyncIterator[scheduler_pb2.LeaseRequest]) -> AsyncIterator[float]:
        """Sends `reports`; yields the reporting interval in seconds whenever the scheduler states it."""
        try:
            async for answer in self._stub.Lease(reports):
                yield answer.report_interval_ms / 1000
        except grpc.RpcError as error:
            raise from_rpc(error) from None


def registration(settings: WorkerSettings, worker: Worker, endpoint: str) -> scheduler_pb2.LeaseRequest:
    """The first message of a lease."""
    return scheduler_pb2.LeaseRequest(
        registration=scheduler_pb2.Registration(
            replica_id=settings.instance,
            endpoint=endpoint,
            model=settings.model_name,
            variant_digest=worker.variant.digest,
            block_tokens=worker.executor.block_tokens,
            max_running=settings.max_running,
            max_waiting=settings.max_waiting,
            kv_capacity_bytes=worker.kv_capacity_bytes,
            labels=settings.label_map,
            weight_bytes=worker.weight_bytes,
            kv_bytes_per_token=worker.kv_bytes_per_token,
            context_tokens=worker.context_tokens,
        )
    )


def load_report(load: Load) -> scheduler_pb2.LeaseRequest:
    """How busy the worker is."""
    return scheduler_pb2.LeaseRequest(
        load=scheduler_pb2.LoadReport(
            running=load.running,
            waiting=load.waiting,
            kv_used_bytes=load.kv_used_bytes,
            pending_prefill_tokens=load.pending_prefill_tokens,
        )
    )


def prefix_report(added: Sequence[bytes], removed: Sequence[bytes], reset: bool) -> scheduler_pb2.LeaseRequest:
    """Which blocks came and went."""
    return scheduler_pb2.LeaseRequest(prefixes=scheduler_pb2.PrefixReport(reset=reset, added=added, removed=removed))


def drain_notice() -> scheduler_pb2.LeaseRequest:
    """The worker takes no new requests."""
    return scheduler_pb2.LeaseRequest(drain=scheduler_pb2.Drain())


def _scope(scope: Scope) -> cache_pb2.Scope:
    return cache_pb2.Scope(variant_digest=scope.variant_digest, tenant=scope.tenant, block_tokens=scope.block_tokens)


def _tokenizer_failure(error: grpc.RpcError) -> ServiceError:
    """What a failed call means. Words that no service chose may name addresses: they go to the log, not to callers."""
    failure = from_rpc(error)
    trailers: dict[str, object] = {}
    if hasattr(error, "trailing_metadata"):
        trailers = dict(error.trailing_metadata() or ())  # type: ignore[arg-type]  # pairs at run time
    if "autoglm-reason" in trailers or not isinstance(failure, Unavailable | Internal):
        return failure
    log.warning("the tokenizer failed", extra={"facts": {"details": failure.message}})
    return Unavailable(f"the tokenizer did not answer ({failure.metadata.get('code', 'UNKNOWN')})")
