"""The gRPC face of a worker: protobuf in, the worker's own types inside, protobuf out."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from autoglm.sparse_inference.v1 import sparse_inference_pb2 as pb
from autoglm.sparse_inference.v1 import sparse_inference_pb2_grpc as rpc
from autoglm.type.v1 import generation_pb2
from opentelemetry import trace
from prometheus_client import Counter

from engine.runtime.constraints import Constraint
from engine.runtime.sampling import Logprobs, Sampling
from engine.runtime.sequences import Finished, FinishReason, Request, Tokens
from services.chassis import telemetry
from services.chassis.errors import InvalidRequest, WrongVariant
from services.sparse_inference.observation import watch
from services.sparse_inference.settings import WorkerSettings
from services.sparse_inference.worker import Worker

SERVICE = "autoglm.sparse_inference.v1.SparseInferenceService"
PICKED_HEADER = "x-gateway-destination-endpoint"

REQUESTS = Counter("autoglm_generations_total", "Generations by how they ended", ["finish"])
PICKED = Counter("autoglm_routed_requests_total", "Generations by who chose this worker", ["by"])

_REASONS = {
    FinishReason.STOP: generation_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
    FinishReason.HANDED_OVER: generation_pb2.FINISH_REASON_HANDED_OVER,
}


class SparseInferenceServer(rpc.SparseInferenceServiceServicer):
    """Implements autoglm.sparse_inference.v1.SparseInferenceService."""

    def __init__(self, settings: WorkerSettings, worker: Worker) -> None:
        self._settings, self._worker = settings, worker

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.GenerateResponse]:
        # Headers once the request has its place: whoever stands in between is done with them before a token comes.
        # Not before that: until then the answer may be a refusal, which is a single frame.
        async with contextlib.aclosing(self.generate(request, context, context.send_initial_metadata)) as answers:
            async for answer in answers:
                yield answer

    async def generate(
        self,
        request: pb.GenerateRequest,
        context: grpc.aio.ServicerContext[Any, Any],
        admitted: Callable[[tuple[()]], Awaitable[None]] | None = None,
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Generate, for callers in this process, too; `admitted` is called with () when the request has its place."""
        self._fence(request.variant_digest, request.model)
        self._note_picker(context)
        span = trace.get_current_span()
        span.set_attribute("gen_ai.operation.name", "generate_content")
        span.set_attribute("gen_ai.provider.name", "autoglm")
        span.set_attribute("gen_ai.request.model", self._settings.model_name)
        span.set_attribute("autoglm.request.id", request.request_id)
        span.set_attribute("autoglm.variant.digest", self._worker.variant.digest)
        digest = self._worker.variant.digest
        asked = self._request_of(request)
        first, position = True, request.resumed_tokens
        run = self._worker.run(asked, request.tenant, _constraint(request), admitted)
        async with contextlib.aclosing(watch(self._settings.model_name, asked, run)) as events:
            async for event in events:
                if isinstance(event, Finished):
                    self._note_end(span, event)
                    yield pb.GenerateResponse(variant_digest=digest, finish=_finish(event))
                    return
                if first:
                    span.add_event("first token")
                    first = False
                yield pb.GenerateResponse(variant_digest=digest, chunk=_chunk(event, position))
                position += len(event.token_ids)

    async def Score(self, request: pb.ScoreRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.ScoreResponse:
        self._fence(request.variant_digest, "")
        start = request.start or 1
        if start >= len(request.token_ids):
            raise InvalidRequest(f"start is {start}, but there are only {len(request.token_ids)} tokens")
        asked = Request(
            token_ids=list(request.token_ids),
            max_tokens=0,
            logprobs=True,
            top_logprobs=request.top_logprobs,
            score_from=start,
        )
        response = pb.ScoreResponse(variant_digest=self._worker.variant.digest)
        async with contextlib.aclosing(self._worker.run(asked, "score")) as events:  # type: ignore[type-var]
            async for event in events:
                if isinstance(event, Tokens):
                    response.positions.extend(_logprobs(entry) for entry in event.logprobs)
        return response

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.GetModelInfoResponse:
        variant = self._worker.variant
        arch = variant.architecture
        return pb.GetModelInfoResponse(
            model=self._settings.model_name,
            variant_digest=variant.digest,
            tokenizer_digest=variant.tokenizer_digest,
            architecture=arch.family,
            vocabulary_size=arch.vocab_size,
            context_tokens=self._worker.context_tokens,
            block_tokens=self._worker.executor.block_tokens,
            end_token_ids=arch.end_token_ids,
            executor=self._settings.executor,
            parameters=arch.parameters,
            weight_bytes=self._worker.weight_bytes,
            kv_bytes_per_token=self._worker.kv_bytes_per_token,
        )

    async def GetLoad(
        self, request: pb.GetLoadRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.GetLoadResponse:
        load = self._worker.load()
        return pb.GetLoadResponse(
            running=load.running,
            waiting=load.waiting,
            max_running=self._settings.max_running,
            max_waiting=self._settings.max_waiting,
            kv_used_bytes=load.kv_used_bytes,
            kv_capacity_bytes=self._worker.kv_capacity_bytes,
            generated_tokens=load.generated_tokens,
            draining=self._worker.draining,
        )

    def _fence(self, digest: str, model: str) -> None:
        """Fails closed when the caller wants another variant or model than the one loaded here."""
        if digest and digest != self._worker.variant.digest:
            raise WrongVariant(
                f"this worker serves {self._worker.variant.digest}, not {digest}", loaded=self._worker.variant.digest
            )
        if model and model != self._settings.model_name:
            raise WrongVariant(f"this worker serves {self._settings.model_name}, not {model}")

    def _note_picker(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """Counts whether the scheduler chose this worker or Envoy had to: no fallback is silent."""
        metadata = dict(context.invocation_metadata() or ())
        if PICKED_HEADER in metadata:
            PICKED.labels("scheduler").inc()
        else:
            PICKED.labels("envoy").inc()
            telemetry.fallback("no_endpoint_picked", instance=self._settings.instance)

    def _request_of(self, request: pb.GenerateRequest) -> Request:
        given = request.sampling

        def value(name: Any, default: float) -> float:
            return float(getattr(given, name)) if given.HasField(name) else default

        sampling = Sampling(
            temperature=value("temperature", 1.0),
            top_p=value("top_p", 1.0),
            top_k=given.top_k,
            min_p=value("min_p", 0.0),
            presence_penalty=value("presence_penalty", 0.0),
            frequency_penalty=value("frequency_penalty", 0.0),
            repetition_penalty=value("repetition_penalty", 1.0),
            seed=given.seed,
            choice=request.choice_index,
            logit_bias={entry.token_id: entry.bias for entry in given.logit_bias},
        )
        ids = list(request.token_ids)
        ends = frozenset(self._worker.variant.architecture.end_token_ids)
        return Request(
            token_ids=ids,
            max_tokens=request.max_tokens or max(1, self._worker.context_tokens - len(ids)),
            sampling=sampling,
            stop_token_ids=frozenset(request.stop_token_ids),
            end_token_ids=frozenset() if request.ignore_eos else ends,
            logprobs=request.logprobs,
            top_logprobs=request.top_logprobs,
            resumed_tokens=request.resumed_tokens,
            min_tokens=request.min_tokens,
        )

    def _note_end(self, span: trace.Span, event: Finished) -> None:
        REQUESTS.labels(event.reason.value).inc()
        span.set_attribute("gen_ai.response.finish_reasons", [event.reason.value])
        span.set_attribute("gen_ai.usage.input_tokens", event.prompt_tokens)
        span.set_attribute("gen_ai.usage.output_tokens", event.completion_tokens)
        span.set_attribute("gen_ai.usage.cache_read.input_tokens", event.cached_tokens)


def _constraint(request: pb.GenerateRequest) -> Constraint | None:
    match request.WhichOneof("constraint"):
        case "json_schema":
            return Constraint("json_schema", request.json_schema)
        case "regex":
            return Constraint("regex", request.regex)
        case "grammar":
            return Constraint("grammar", request.grammar)
    return None


def _chunk(event: Tokens, position: int) -> pb.TokenChunk:
    return pb.TokenChunk(
        token_ids=event.token_ids,
        logprobs=[_logprobs(entry) for entry in event.logprobs],
        first_position=position,
        cached_tokens=event.cached_tokens,
    )


def _logprobs(entry: Logprobs) -> pb.PositionLogprobs:
    return pb.PositionLogprobs(
        chosen=generation_pb2.TokenLogprob(token_id=entry.chosen[0], logprob=entry.chosen[1]),
        top=[generation_pb2.TokenLogprob(token_id=token, logprob=logprob) for token, logprob in entry.top],
    )


def _finish(event: Finished) -> pb.Finish:
    return pb.Finish(
        reason=_REASONS[event.reason],
        stop_token_id=event.stop_token_id,
        usage=generation_pb2.Usage(
            prompt_tokens=event.prompt_tokens,
            cached_tokens=event.cached_tokens,
            completion_tokens=event.completion_tokens,
        ),
    )
