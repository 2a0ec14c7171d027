"""Starts the cache service: takes over what is on disk, then serves. `python -m services.cache`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import uvloop
from autoglm.cache.v1 import cache_pb2, cache_pb2_grpc

from services.cache import files
from services.cache.artifacts import ArtifactStore
from services.cache.disk_tier import DiskTier
from services.cache.eviction import Eviction
from services.cache.memory_tier import MemoryTier
from services.cache.object_store import BadUrl, ObjectStore
from services.cache.redis_tier import RedisTier
from services.cache.server import CacheServicer
from services.cache.settings import CacheSettings
from services.cache.shared_artifacts import SharedArtifacts
from services.cache.store import BlockStore
from services.cache.tiers import Tier
from services.chassis.offload import Offload
from services.chassis.serving import Member
from services.chassis.settings import read


async def open_tiers(settings: CacheSettings, root: Path | None, offload: Offload) -> list[Tier]:
    """The tiers that the settings switch on, fastest first."""
    share, block_bytes = settings.cache_scope_share, settings.cache_max_block_bytes
    tiers: list[Tier] = []
    if capacity := settings.cache_memory_bytes:
        tiers.append(MemoryTier(capacity, int(capacity * share)))
    if (capacity := settings.cache_disk_bytes) and root is not None:
        order = Eviction(capacity, int(capacity * share))
        disk = DiskTier(root, order, offload, block_bytes, settings.cache_disk_retry_s, bool(settings.redis_url))
        await disk.open()
        tiers.append(disk)
    if settings.redis_url:
        timeout_s = settings.redis_timeout_ms / 1000
        tiers.append(
            RedisTier(settings.redis_url, timeout_s, settings.redis_ttl_s, settings.redis_connections, block_bytes)
        )
    return tiers


def open_object_store(settings: CacheSettings) -> ObjectStore | None:
    """What the artifact store shares with other caches. Raises `BadUrl`."""
    if not settings.cache_artifact_url:
        return None
    return ObjectStore(
        settings.cache_artifact_url,
        settings.cache_artifact_timeout_ms / 1000,
        settings.cache_artifact_connect_ms / 1000,
        settings.cache_artifact_allow_http,
    )


async def serve(settings: CacheSettings) -> None:
    member = Member("cache", settings, [cache_pb2.DESCRIPTOR.services_by_name["CacheService"].full_name])
    root = Path(settings.cache_directory) if settings.cache_directory else None
    lock = files.lock(root) if root is not None else None
    offload = Offload("cache files", settings.cache_io_threads, settings.cache_io_waiting)
    try:
        if root is not None:
            await offload(files.clear_temporary, root)
        tiers = await open_tiers(settings, root, offload)
        blocks = BlockStore(tiers, settings.cache_max_block_bytes, settings.cache_links)
        local = ArtifactStore(root, settings.cache_artifact_bytes, settings.cache_max_artifact_bytes, offload)
        await local.open()
        shared = open_object_store(settings)
        artifacts = SharedArtifacts(local, shared, offload, settings.cache_artifact_downloads)
        servicer = CacheServicer(blocks, artifacts, offload, settings.cache_max_blocks_per_put)
        cache_pb2_grpc.add_CacheServiceServicer_to_server(servicer, member.server)
        await member.start()
        await member.ready()
        await member.run()
        await artifacts.close()
        await blocks.close(settings.cache_spill_s)
    finally:
        offload.close()
        if lock is not None:
            os.close(lock)


def main() -> None:
    settings = read(CacheSettings)
    try:
        uvloop.run(serve(settings))
    except BadUrl as error:
        print(f"AUTOGLM_CACHE_ARTIFACT_URL: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except (files.DirectoryInUse, OSError) as error:
        print(f"the cache cannot start: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
