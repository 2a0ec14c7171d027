"""Where a model by digest comes from: the cache service, reached as every other service is. For programs that need its
files before they serve.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import grpc
from autoglm.cache.v1 import cache_pb2, cache_pb2_grpc

from services.chassis.channels import connect
from services.chassis.errors import from_rpc
from services.chassis.model_fetch import Terms, fetch
from services.chassis.model_settings import ModelFetchSettings
from services.chassis.progress import Reporter


class CacheArtifacts:
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


async def from_cache(
    settings: ModelFetchSettings,
    digest: str,
    root: Path,
    doing: str,
    wants: Callable[[str], bool] = lambda _: True,
    suffix: str = "",
) -> Path:
    """Where the model lies now, below `root`; `doing` is what the progress says. Raises CannotFetch."""
    terms = Terms(settings.model_fetch_patience_s, settings.model_fetch_mib << 20, wants, suffix)
    channel = connect(settings, "cache")
    try:
        return await fetch(digest, root, CacheArtifacts(channel), terms, Reporter(doing))
    finally:
        await channel.close(None)
