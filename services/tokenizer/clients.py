"""The tokenizer's one outgoing call: a model's files from the cache, by digest, before it serves."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import grpc
from autoglm.cache.v1 import cache_pb2, cache_pb2_grpc

from services.chassis.errors import from_rpc


class ArtifactClient:
    """`model_fetch.Artifacts` over gRPC. No deadline: a file takes as long as it comes."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = cache_pb2_grpc.CacheServiceStub(channel)

    async def artifact(self, digest: str, offset: int) -> AsyncGenerator[tuple[bytes, int], None]:
        request = cache_pb2.GetArtifactRequest(digest=digest, offset=offset)
        try:
            async for answer in self._stub.GetArtifact(request):
                yield answer.content, answer.total_bytes
        except grpc.RpcError as error:
            raise from_rpc(error) from None
