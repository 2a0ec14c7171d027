"""The worker's own API when the model is not a language model: it says what is served and refuses to generate.

A caller who asks an ONNX worker for tokens gets a typed error that names the model and the protocol to use instead.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any, NoReturn

from autoglm.sparse_inference.v1 import sparse_inference_pb2 as pb
from autoglm.sparse_inference.v1 import sparse_inference_pb2_grpc as rpc

from engine.executors.onnx import OnnxModel
from services.chassis.errors import WrongVariant
from services.sparse_inference.oip_onnx import OnnxServing
from services.sparse_inference.settings import WorkerSettings


class OnnxServer(rpc.SparseInferenceServiceServicer):
    """Implements autoglm.sparse_inference.v1.SparseInferenceService for a model that makes no tokens."""

    def __init__(
        self, settings: WorkerSettings, model: OnnxModel, serving: OnnxServing, is_draining: Callable[[], bool]
    ) -> None:
        self._settings, self._model, self._serving, self._is_draining = settings, model, serving, is_draining

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        self._refuse()
        yield pb.GenerateResponse()  # never reached; it makes this a stream

    async def Score(self, request: pb.ScoreRequest, context: Any) -> pb.ScoreResponse:
        self._refuse()

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Any) -> pb.GetModelInfoResponse:
        return pb.GetModelInfoResponse(
            model=self._settings.model_name,
            variant_digest=self._model.file.digest,
            architecture="onnx",
            executor="onnxruntime",
            weight_bytes=self._model.file.total_bytes,
        )

    async def GetLoad(self, request: pb.GetLoadRequest, context: Any) -> pb.GetLoadResponse:
        running = min(self._serving.at_work, self._settings.onnx_runs)
        return pb.GetLoadResponse(
            running=running,
            waiting=self._serving.at_work - running,
            max_running=self._settings.onnx_runs,
            max_waiting=self._settings.onnx_waiting,
            draining=self._is_draining(),
        )

    def _refuse(self) -> NoReturn:
        name = self._settings.model_name
        raise WrongVariant(
            f"{name} is an ONNX model and makes no tokens; it answers ModelInfer of the Open Inference Protocol",
            model=name, architecture="onnx",
        )  # fmt: skip
