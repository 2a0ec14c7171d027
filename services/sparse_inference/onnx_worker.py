"""Serves an ONNX file: loads it, offers the Open Inference Protocol, drains. `__main__` calls it instead of a variant.

Such a worker takes no lease: the scheduler places token streams, and this one has none. Callers reach it by the name of
its own service.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from autoglm.sparse_inference.v1 import sparse_inference_pb2_grpc as rpc
from autoglm.third_party import oip_pb2_grpc

from engine.executors.onnx import Limits, OnnxModel
from services.chassis.offload import Offload
from services.chassis.serving import Member
from services.sparse_inference import metrics
from services.sparse_inference.oip import OipServer
from services.sparse_inference.oip_onnx import OnnxServing
from services.sparse_inference.onnx_server import OnnxServer
from services.sparse_inference.settings import WorkerSettings

ENVELOPE_BYTES = 64 << 10
"""Part of a message that is left for names and shapes."""


async def load(settings: WorkerSettings, file: Path) -> OnnxModel:
    """The model. Raises CheckpointError when the file cannot be served."""
    limits = Limits(
        model_bytes=settings.onnx_model_mib << 20,
        arena_bytes=settings.onnx_arena_mib << 20,
        output_bytes=max(settings.max_message_bytes - ENVELOPE_BYTES, 1024),
        threads=settings.onnx_threads,
    )
    return await asyncio.to_thread(OnnxModel.load, file, limits)


async def serve(settings: WorkerSettings, member: Member, model: OnnxModel) -> None:
    """Runs until SIGTERM."""
    offload = Offload("onnx", settings.onnx_runs, settings.onnx_waiting)
    serving = OnnxServing(settings.model_name, model, offload, member.stopping.is_set)
    oip = OipServer(settings, serving)
    metrics.register_onnx(settings, serving)
    oip_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(oip, member.server)
    rpc.add_SparseInferenceServiceServicer_to_server(
        OnnxServer(settings, model, serving, member.stopping.is_set), member.server
    )

    async def leave() -> None:
        oip.drain()

    member.before_drain(leave)
    await member.start()
    await member.ready()
    await member.run()
    offload.close()
