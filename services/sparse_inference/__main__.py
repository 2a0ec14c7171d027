"""`python -m services.sparse_inference`: loads a variant, joins the scheduler, serves until SIGTERM."""

from __future__ import annotations

import asyncio
import os
import sys

# One BLAS thread per worker: products are small, and workers share the machine. Must be set before numpy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from autoglm.sparse_inference.v1 import sparse_inference_pb2_grpc as rpc

from engine.checkpoints import variant as variants
from engine.checkpoints.architecture import CheckpointError
from engine.checkpoints.digest_cache import DigestCache, default_cache_directory
from engine.executors.reference import ReferenceExecutor, page_bytes
from engine.runtime.constraints import Compiler, tokenizer_of
from engine.runtime.pages import PagePool
from services.chassis.channels import connect
from services.chassis.serving import Member
from services.chassis.settings import read
from services.sparse_inference import metrics
from services.sparse_inference.clients import CacheClient, LeaseClient
from services.sparse_inference.lease import Lease
from services.sparse_inference.prefixes import Prefixes
from services.sparse_inference.server import SERVICE, SparseInferenceServer
from services.sparse_inference.settings import WorkerSettings
from services.sparse_inference.worker import Worker

LEAVE_S = 2.0
"""After the last call: how long the step thread may end, and the blocks on their way to the cache may arrive."""


async def main() -> None:
    settings = read(WorkerSettings)
    member = Member("sparse-inference", settings, [SERVICE])
    limit = settings.max_weights_mib << 20
    remembered = (settings.cache_dir or default_cache_directory()) / "digests" if settings.remember_digests else None
    digests = DigestCache(remembered)
    try:
        variant = await asyncio.to_thread(variants.load, settings.model_dir, "float32-reference", limit, digests)
        page_count = max(1, settings.kv_capacity_bytes // page_bytes(variant.architecture))
        executor = await asyncio.to_thread(
            ReferenceExecutor, variant.checkpoint, page_count, settings.limits.step_rows, limit
        )
        variant.check_unchanged()
    except CheckpointError as error:
        print(f"AUTOGLM_MODEL_DIR: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    pages = PagePool(executor.page_count)
    cache, scheduler = connect(settings, "cache"), connect(settings, "scheduler")
    prefixes = Prefixes(pages, CacheClient(cache), settings.cache_budget_ms / 1000, settings.publish_queue)
    arch = variant.architecture
    tokenizer = tokenizer_of(variant.path)
    compiler = Compiler(tokenizer, arch.vocab_size, arch.end_token_ids, settings.constraint_limits)
    worker = Worker(settings, variant, executor, prefixes, pages, compiler)
    metrics.register(settings, worker)
    rpc.add_SparseInferenceServiceServicer_to_server(SparseInferenceServer(settings, worker), member.server)
    worker.start()
    await member.start()
    await member.ready()
    endpoint = settings.advertise or f"{settings.bind}:{member.port}"
    lease = Lease(settings, worker, pages, LeaseClient(scheduler), endpoint)
    tasks = [asyncio.create_task(lease.hold()), asyncio.create_task(prefixes.publish())]

    async def leave() -> None:
        await lease.drain()
        worker.drain()

    member.before_drain(leave)
    await member.run()
    await worker.ended(LEAVE_S)
    await prefixes.flush(LEAVE_S)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await cache.close(None)
    await scheduler.close(None)


if __name__ == "__main__":
    asyncio.run(main())
