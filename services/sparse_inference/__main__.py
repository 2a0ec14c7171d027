"""`python -m services.sparse_inference`: loads a variant, joins the scheduler, serves until SIGTERM."""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
import uuid
from pathlib import Path

# One BLAS thread per worker: products are small, and workers share the machine. Must be set before numpy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import uvloop
from autoglm.manifest import is_digest
from autoglm.sparse_inference.v1 import sparse_inference_pb2_grpc as rpc
from autoglm.third_party import oip_pb2_grpc

from engine.checkpoints import architecture, onnx_file
from engine.checkpoints import variant as variants
from engine.checkpoints.architecture import CheckpointError
from engine.checkpoints.digest_cache import DigestCache, default_cache_directory
from engine.runtime.constraints import Compiler, tokenizer_of
from engine.runtime.pages import PagePool
from services.chassis.channels import connect
from services.chassis.model_fetch import CannotFetch, Terms, fetch
from services.chassis.progress import Reporter
from services.chassis.serving import Member
from services.chassis.settings import read
from services.sparse_inference import engines, metrics, oip
from services.sparse_inference.clients import ArtifactClient, CacheClient, LeaseClient, TokenizerClient
from services.sparse_inference.lease import Lease, reached_at
from services.sparse_inference.oip_text import TextModel
from services.sparse_inference.prefixes import Prefixes
from services.sparse_inference.server import SERVICE, SparseInferenceServer
from services.sparse_inference.settings import WorkerSettings
from services.sparse_inference.worker import Worker

LEAVE_S = 2.0
"""After the last call: how long the step thread may end, and the blocks on their way to the cache may arrive."""


async def main() -> None:
    settings = read(WorkerSettings)
    member = Member("sparse-inference", settings, [SERVICE, oip.SERVICE])
    if is_digest(str(settings.model_dir)):
        settings = settings.model_copy(update={"model_dir": await _fetched(settings)})
    if (file := onnx_file.find(settings.model_dir)) is not None:
        return await _serve_onnx(settings, member, file)
    limit = settings.max_weights_mib << 20
    remembered = (settings.cache_dir or default_cache_directory()) / "digests" if settings.remember_digests else None
    digests = DigestCache(remembered, progress=Reporter("hashing weights"))
    try:
        arithmetic = engines.arithmetic(settings)
        variant = await asyncio.to_thread(variants.load, settings.model_dir, arithmetic, limit, digests)
        executor = await asyncio.to_thread(engines.make, settings, variant)
        variant.check_unchanged()
    except CheckpointError as error:
        print(f"AUTOGLM_MODEL_DIR: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except engines.CannotRun as error:
        print(f"the engine cannot run: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    pages = PagePool(executor.page_count)
    cache, scheduler = connect(settings, "cache"), connect(settings, "scheduler")
    prefixes = Prefixes(
        pages,
        CacheClient(cache),
        settings.cache_budget_ms / 1000,
        settings.publish_queue,
        settings.publish_interval_ms / 1000,
    )
    arch = variant.architecture
    compiler = Compiler(tokenizer_of(variant.path), arch.vocab_size, arch.end_token_ids, settings.constraint_limits)
    worker = Worker(settings, variant, executor, prefixes, pages, compiler, variant.known)
    metrics.register(settings, worker)
    server = SparseInferenceServer(settings, worker)
    rpc.add_SparseInferenceServiceServicer_to_server(server, member.server)
    tokenizer = connect(settings, "tokenizer")
    model = TextModel(
        settings,
        settings.model_name,
        variant.tokenizer_digest,
        lambda: worker.draining,
        server.generate,
        TokenizerClient(tokenizer, settings.tokenizer_timeout_ms / 1000),
        new_seed=lambda: secrets.randbits(63),
        new_id=lambda: uuid.uuid4().hex,
    )
    face = oip.OipServer(settings, model)
    oip_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(face, member.server)
    worker.start()
    await member.start()
    await member.ready()
    lease = Lease(settings, worker, pages, LeaseClient(scheduler), reached_at(settings, member.port))
    tasks = [asyncio.create_task(lease.hold()), asyncio.create_task(prefixes.publish())]

    async def leave() -> None:
        await lease.drain()
        worker.drain()
        face.drain()

    member.before_drain(leave)
    await member.run()
    await worker.ended(LEAVE_S)
    await prefixes.flush(LEAVE_S)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await cache.close(None)
    await scheduler.close(None)
    await tokenizer.close(None)


async def _fetched(settings: WorkerSettings) -> Path:
    """Where the model that is named by a digest lies now."""
    channel = connect(settings, "cache")
    terms = Terms(settings.model_fetch_patience_s, settings.model_fetch_mib << 20)
    root = settings.cache_dir or default_cache_directory()
    try:
        return await fetch(
            str(settings.model_dir), root, ArtifactClient(channel), terms, Reporter("fetching the model")
        )
    except CannotFetch as error:
        print(f"AUTOGLM_MODEL_DIR: {error}", file=sys.stderr)
        raise SystemExit(2 if error.is_final else 1) from None
    finally:
        await channel.close(None)


async def _serve_onnx(settings: WorkerSettings, member: Member, file: Path) -> None:
    """The whole life of a worker whose model is an ONNX file."""
    try:
        from services.sparse_inference import onnx_worker  # needs onnxruntime, which no other model does

        model = await onnx_worker.load(settings, file)
    except ImportError as error:
        print(f"AUTOGLM_MODEL_DIR: {file} needs {error.name}; pip install --group onnx", file=sys.stderr)
        raise SystemExit(2) from None
    except architecture.CheckpointError as error:
        print(f"AUTOGLM_MODEL_DIR: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    await onnx_worker.serve(settings, member, model)


if __name__ == "__main__":
    uvloop.run(main())
