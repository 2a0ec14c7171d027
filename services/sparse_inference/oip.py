"""The worker's second face: Open Inference Protocol v2, so that clients of KServe and Triton work unchanged.

Here is what every model has in common: names and versions, readiness, the bounds of a request, and Triton's stream of
requests. What a request means belongs to the model behind it: `oip_text` for language models, `oip_onnx` for the rest.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any, Protocol, TypeAlias

import grpc
from autoglm.third_party import oip_pb2 as pb
from autoglm.third_party import oip_pb2_grpc as rpc

from services.chassis import deadlines
from services.chassis.errors import Internal, InvalidRequest, NotFound, ServiceError, Unavailable, status_of
from services.sparse_inference import oip_tensors
from services.sparse_inference.oip_settings import OipSettings

log = logging.getLogger("autoglm.oip")

SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
VERSION = "1"
"""The only version of the only model; an empty one means the same."""
EXTENSIONS = ("model_stream_infer", "parameters")
FINAL = "triton_final_response"
"""Parameter of every answer on a stream: whether it is the request's last one."""
REASON = "autoglm_reason"
"""Parameter of a refusal on a stream: the reason of services/chassis/errors.py."""
STRICT_HEADER = "triton_grpc_error"
"""A caller that sends it as `true` wants a failed request to end the stream with its gRPC status."""
UNSUPPORTED = ("sequence_id", "sequence_start", "sequence_end", "priority", "binary_data_output")
TIMEOUT = "timeout"
"""Parameter in microseconds, as Triton has it."""
ANSWERS_QUEUED = 64

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class Model(Protocol):
    """What is served under one name."""

    name: str
    in_order: bool
    """Requests of one stream are computed one after the other."""

    @property
    def is_ready(self) -> bool:
        """False while draining."""

    def metadata(self) -> pb.ModelMetadataResponse:
        """What it takes and gives; the name and versions are filled in by the caller."""

    async def infer(self, request: pb.ModelInferRequest, context: Context) -> pb.ModelInferResponse:
        """The one answer to a checked request."""

    def stream(self, request: pb.ModelInferRequest, context: Context) -> AsyncGenerator[pb.ModelInferResponse, None]:
        """The answers to a checked request, one at least, the last of them marked with FINAL."""


class OipServer(rpc.GRPCInferenceServiceServicer):
    """Implements inference.GRPCInferenceService for one model."""

    def __init__(self, settings: OipSettings, model: Model) -> None:
        self._settings, self._model = settings, model
        self._draining = asyncio.Event()

    def drain(self) -> None:
        """Streams end when what they have begun is done: an idle one would hold up the process's end."""
        self._draining.set()

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Context) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: Context) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self._model.is_ready)

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Context) -> pb.ModelReadyResponse:
        is_known = request.name == self._model.name and request.version in ("", VERSION)
        return pb.ModelReadyResponse(ready=is_known and self._model.is_ready)

    async def ServerMetadata(self, request: pb.ServerMetadataRequest, context: Context) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(name="autoglm", version="v1", extensions=EXTENSIONS)

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: Context) -> pb.ModelMetadataResponse:
        self._check_model(request.name, request.version)
        described = self._model.metadata()
        described.name, described.versions[:] = self._model.name, [VERSION]
        return described

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Context) -> pb.ModelInferResponse:
        self._check(request)
        return self._sized(await self._model.infer(request, context))

    async def ModelStreamInfer(
        self, request_iterator: AsyncIterator[pb.ModelInferRequest], context: Context
    ) -> AsyncIterator[pb.ModelStreamInferResponse]:
        is_strict = dict(context.invocation_metadata() or ()).get(STRICT_HEADER) == "true"
        stream = _Stream(self, request_iterator, context, is_strict)
        try:
            async for answer in stream.answers():
                yield answer
        finally:
            await stream.close()

    async def _answers(self, request: pb.ModelInferRequest, context: Context) -> AsyncIterator[pb.ModelInferResponse]:
        self._check(request)
        async with aclosing(self._model.stream(request, context)) as answers:
            async for answer in answers:
                yield self._sized(answer)

    def _check(self, request: pb.ModelInferRequest) -> None:
        """Bounds, names, and the time the request may take."""
        oip_tensors.check(request, self._settings)
        self._check_model(request.model_name, request.model_version)
        for name in UNSUPPORTED:
            if name in request.parameters:
                raise InvalidRequest(f"the parameter {name!r} is not served here", field=name)
        if TIMEOUT in request.parameters:
            timeout_us = oip_tensors.parameter(request.parameters[TIMEOUT])
            if not isinstance(timeout_us, int) or isinstance(timeout_us, bool) or timeout_us < 0:
                raise InvalidRequest(f"{TIMEOUT} is a whole number of microseconds, not {str(timeout_us)[:32]!r}")
            if timeout_us:
                left = deadlines.remaining_s()
                deadlines.start(timeout_us / 1e6 if left is None else min(left, timeout_us / 1e6))

    def _check_model(self, name: str, version: str) -> None:
        if name != self._model.name or version not in ("", VERSION):
            asked = f"{name[:128]!r}" + (f" version {version[:32]!r}" if version else "")
            raise NotFound(f"{asked} is not here; this worker serves {self._model.name!r} version {VERSION!r}")

    def _sized(self, answer: pb.ModelInferResponse) -> pb.ModelInferResponse:
        size, limit = answer.ByteSize(), self._settings.max_message_bytes
        if size > limit:
            raise InvalidRequest(f"the answer has {size} bytes, more than the {limit} of AUTOGLM_MAX_MESSAGE_BYTES")
        return answer


class _Stream:
    """One ModelStreamInfer call: requests are read as there is room for them, each answered by a task of its own."""

    def __init__(
        self,
        server: OipServer,
        requests: AsyncIterator[pb.ModelInferRequest],
        context: Context,
        is_strict: bool,
    ) -> None:
        self._server, self._requests, self._context, self._is_strict = server, requests, context, is_strict
        limit = 1 if server._model.in_order else server._settings.oip_stream_requests
        self._room = asyncio.Semaphore(limit)
        self._queue: asyncio.Queue[pb.ModelStreamInferResponse | Exception | None] = asyncio.Queue(ANSWERS_QUEUED)
        self._tasks: set[asyncio.Task[None]] = set()
        self._reader = asyncio.create_task(self._read())

    async def answers(self) -> AsyncIterator[pb.ModelStreamInferResponse]:
        """Answers of all requests as they come. Raises what ends the stream."""
        while (answer := await self._queue.get()) is not None:
            if isinstance(answer, Exception):
                raise answer
            yield answer

    async def close(self) -> None:
        """Cancels what is still at work."""
        tasks = [self._reader, *self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self) -> None:
        try:
            while True:
                await self._room.acquire()
                request = await self._next()
                if request is None:
                    break
                task = asyncio.create_task(self._serve(request))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            await asyncio.gather(*self._tasks)
            if self._server._draining.is_set():
                raise Unavailable("the worker is draining; begin another stream")
            await self._queue.put(None)
        except Exception as error:  # whatever it is, it ends the call, and the chassis says how
            await self._queue.put(error)

    async def _next(self) -> pb.ModelInferRequest | None:
        """The next request; None when no more come or none are taken any more."""
        read = asyncio.ensure_future(_one(self._requests))
        drained = asyncio.ensure_future(self._server._draining.wait())
        try:
            await asyncio.wait((read, drained), return_when=asyncio.FIRST_COMPLETED)
            return await read if read.done() else None
        finally:
            read.cancel()
            drained.cancel()

    async def _serve(self, request: pb.ModelInferRequest) -> None:
        try:
            async with aclosing(self._server._answers(request, self._context)) as answers:  # type: ignore[type-var]
                async for answer in answers:
                    await self._queue.put(pb.ModelStreamInferResponse(infer_response=answer))
        except Exception as error:
            await self._queue.put(self._refusal(request, error))
        finally:
            self._room.release()

    def _refusal(self, request: pb.ModelInferRequest, error: Exception) -> pb.ModelStreamInferResponse | Exception:
        if self._is_strict:
            return error
        if not isinstance(error, ServiceError):
            log.exception("unexpected failure of a request on a stream", exc_info=error)
            error = Internal("internal error; the worker's log has the details")
        code, text, trailers = status_of(error)
        answer = pb.ModelInferResponse(model_name=self._server._model.name, model_version=VERSION, id=request.id)
        answer.parameters[REASON].string_param = str(dict(trailers)["autoglm-reason"])
        answer.parameters[FINAL].bool_param = True
        return pb.ModelStreamInferResponse(error_message=f"[{code.name}] {text}", infer_response=answer)


async def _one(requests: AsyncIterator[pb.ModelInferRequest]) -> pb.ModelInferRequest | None:
    return await anext(requests, None)
