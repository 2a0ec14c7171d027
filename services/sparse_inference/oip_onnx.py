"""An ONNX model over the Open Inference Protocol: ModelInfer with the model's own tensors.

Reading tensors, computing and writing them happens in a bounded pool of threads; the event loop only waits, at most as
long as the caller's deadline, and a run nobody waits for any more is ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping

from autoglm.third_party import oip_pb2 as pb

from engine.executors.onnx import Cancelled, OnnxModel, Run, RunError, TensorSpec
from services.chassis import deadlines
from services.chassis.errors import InvalidRequest, OutOfTime
from services.chassis.offload import Offload
from services.sparse_inference import oip_tensors
from services.sparse_inference.oip import FINAL, TIMEOUT, VERSION, Context
from services.sparse_inference.oip_tensors import Array

PLATFORM = "onnxruntime_onnx"
"""What Triton calls it."""


class OnnxServing:
    """`oip.Model` for one ONNX model."""

    in_order = True

    def __init__(self, name: str, model: OnnxModel, offload: Offload, is_draining: Callable[[], bool]) -> None:
        self.name = name
        self._model, self._offload, self._is_draining = model, offload, is_draining
        self.served = 0
        self.at_work = 0
        """Requests that are computed or wait for a thread."""

    @property
    def is_ready(self) -> bool:
        return not self._is_draining()

    def metadata(self) -> pb.ModelMetadataResponse:
        described = pb.ModelMetadataResponse(platform=PLATFORM)
        for tensors, specs in ((described.inputs, self._model.inputs), (described.outputs, self._model.outputs)):
            for spec in specs.values():
                tensors.add(name=spec.name, datatype=_datatype(spec), shape=spec.shape)
        return described

    async def infer(self, request: pb.ModelInferRequest, context: Context) -> pb.ModelInferResponse:
        for name in request.parameters:
            if name != TIMEOUT and not name.startswith("triton_"):
                raise InvalidRequest(f"the parameter {name!r} is not known here", field=name)
        run = Run()
        self.at_work += 1
        try:
            async with asyncio.timeout(deadlines.remaining_s()):
                answer = await self._offload(self._compute, request, run)
        except TimeoutError:
            raise OutOfTime("the deadline passed before the model had computed the request") from None
        except Cancelled:
            raise OutOfTime("the run was ended") from None
        except RunError as error:
            raise InvalidRequest(str(error), model=self.name) from None
        finally:
            run.cancel()
            self.at_work -= 1
        self.served += 1
        return answer

    async def stream(
        self, request: pb.ModelInferRequest, context: Context
    ) -> AsyncGenerator[pb.ModelInferResponse, None]:
        answer = await self.infer(request, context)
        answer.parameters[FINAL].bool_param = True
        yield answer

    def _compute(self, request: pb.ModelInferRequest, run: Run) -> pb.ModelInferResponse:
        """In a thread."""
        given = oip_tensors.arrays(request)
        feeds = {name: _readable(name, array, self._model.inputs) for name, array in given.items()}
        names = [wanted.name for wanted in request.outputs]
        results = self._model.run(feeds, names, run)
        return oip_tensors.answer(request, VERSION, zip(names or self._model.outputs, results, strict=True))


def _readable(name: str, array: Array, inputs: Mapping[str, TensorSpec]) -> Array:
    """Texts where the model takes texts; everything else as it is."""
    return oip_tensors.decoded(name, array) if array.dtype == oip_tensors.STRING and name in inputs else array


def _datatype(spec: TensorSpec) -> str:
    return oip_tensors.DATATYPES[spec.dtype]
