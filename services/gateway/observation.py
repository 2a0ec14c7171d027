"""What is seen of a generation from outside: one span with GenAI attributes, and Prometheus figures.

Names follow the OpenTelemetry GenAI conventions. Nothing here ever holds a prompt or an answer.
"""

from __future__ import annotations

import asyncio
import time

from opentelemetry import trace
from opentelemetry.trace import SpanKind, Status, StatusCode
from prometheus_client import Counter, Gauge, Histogram

from services.chassis.errors import TABLE, ServiceError
from services.gateway.events import Delta, Event, Finished, Usage
from services.gateway.requests import Request

PROVIDER = "autoglm"
_LABELS = ["gen_ai_operation_name", "gen_ai_request_model"]

REQUEST_SECONDS = Histogram(
    "gen_ai_server_request_duration_seconds",
    "Time from a generation's request to its last event",
    [*_LABELS, "error_type"],
    buckets=tuple(0.01 * 2**power for power in range(14)),
)
FIRST_TOKEN_SECONDS = Histogram(
    "gen_ai_server_time_to_first_token_seconds",
    "Time from a generation's request to its first token",
    _LABELS,
    buckets=(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10),
)
OUTPUT_TOKEN_SECONDS = Histogram(
    "gen_ai_server_time_per_output_token_seconds",
    "Mean time between the tokens of a choice after its first",
    _LABELS,
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5),
)
GENERATIONS = Counter(
    "autoglm_gateway_choices_total", "Choices by how they ended: stop, length, cancelled or error", ["finish_reason"]
)
IN_FLIGHT = Gauge("autoglm_gateway_choices_in_flight", "Choices being generated, of AUTOGLM_MAX_IN_FLIGHT at most")

_TRACER = trace.get_tracer("autoglm.gateway")  # a proxy until telemetry starts


class Observation:
    """Watches one generation. Calls, in order: `is_for`, `event` for each event, `end`; only the first end counts."""

    def __init__(self, request: Request, request_id: str) -> None:
        self._request, self._started = request, time.monotonic()
        self._is_over = False
        self._model = "unknown"  # a label until the catalogue confirms the name: callers must not invent time series
        self._reasons: dict[int, str] = {}
        self._first: float | None = None
        self._pace: dict[int, tuple[float, float, int]] = {}  # choice → times of first and last token, count after
        self.span = _TRACER.start_span(
            f"{request.operation} {request.model}", kind=SpanKind.INTERNAL, attributes=_asked(request, request_id)
        )

    def is_for(self, model: str, seed: int) -> None:
        """The catalogue knows the model; the seed is chosen."""
        self._model = model
        self.span.set_attributes({"gen_ai.response.model": model, "gen_ai.request.seed": str(seed)})

    def event(self, event: Event) -> None:
        now = time.monotonic()
        match event:
            case Delta():
                if self._first is None:
                    self._first = now
                    self.span.set_attribute("gen_ai.response.time_to_first_chunk", now - self._started)
                    self.span.set_attribute("autoglm.variant_digest", event.variant_digest)
                first, _, tokens = self._pace.get(event.choice, (now, now, -1))
                self._pace[event.choice] = first, now, tokens + len(event.tokens)
            case Finished():
                self._reasons[event.choice] = event.reason
            case Usage():
                self.span.set_attributes(
                    {
                        "gen_ai.usage.input_tokens": event.prompt_tokens,
                        "gen_ai.usage.output_tokens": event.completion_tokens,
                        "gen_ai.usage.cache_read.input_tokens": event.cached_tokens,
                    }
                )

    def end(self, failure: BaseException | None) -> None:
        """The generation is over; `failure` is what ended it, if anything did."""
        if self._is_over:
            return
        self._is_over = True
        labels = (self._request.operation, self._model)
        kind = _name_of(failure)
        REQUEST_SECONDS.labels(*labels, kind).observe(time.monotonic() - self._started)
        if self._first is not None:
            FIRST_TOKEN_SECONDS.labels(*labels).observe(self._first - self._started)
        for first, last, tokens in self._pace.values():
            if tokens > 0:
                OUTPUT_TOKEN_SECONDS.labels(*labels).observe((last - first) / tokens)
        ending = "cancelled" if isinstance(failure, asyncio.CancelledError) else "error"
        for choice in range(self._request.all_choices):
            GENERATIONS.labels(self._reasons.get(choice, ending)).inc()
        reasons = [reason for _, reason in sorted(self._reasons.items())]
        self.span.set_attribute("gen_ai.response.finish_reasons", reasons)
        if failure is not None:
            self.span.set_attribute("error.type", kind)
            self.span.set_status(Status(StatusCode.ERROR, kind))
        self.span.end()


def _name_of(failure: BaseException | None) -> str:
    if failure is None:
        return ""
    if isinstance(failure, asyncio.CancelledError):
        return "CANCELLED"
    if isinstance(failure, ServiceError):
        return next(TABLE[kind][1] for kind in type(failure).__mro__ if kind in TABLE)
    return "INTERNAL"


def _asked(request: Request, request_id: str) -> dict[str, str | int | float | tuple[str, ...]]:
    sampling = request.sampling
    wanted: dict[str, str | int | float | None] = {
        "gen_ai.operation.name": request.operation,
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": request.model,
        "gen_ai.request.max_tokens": request.max_tokens or None,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.top_k": sampling.top_k,
        "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
        "gen_ai.request.presence_penalty": sampling.presence_penalty,
        "gen_ai.request.choice.count": request.all_choices if request.all_choices != 1 else None,
        "gen_ai.response.id": request_id,
    }
    return {name: value for name, value in wanted.items() if value is not None}
