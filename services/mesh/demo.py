"""The first request: one chat message sent as a client would send it, and the wait for its whole trace.

`make run` shows it to people, `make smoke` judges it. Through the SDK, over the ingress, with a client's own span.
"""

from __future__ import annotations

import http.client
import json
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from autoglm import AutoglmError, Client, Delta, Done, Finish
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode

from services.mesh.spans import Span, Tree, build

PROMPT = "Write a Python function `close_{number}`. Close the file and release the lock."
MAX_TOKENS = 64
SEED = 7
TEMPERATURE = 0.4
TRACE_WAIT_S = 10.0
SETTLED_S = 0.45
"""Two export intervals without news: leaves that nobody misses have come by then."""
QUIET_S = 2.0
"""Ten intervals without news: whoever is still missing took no part."""
POLL_S = 0.05
CLIENT = "client"


class NoAnswer(Exception):
    """The request failed; the text says how, and what came before."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back."""

    text: str
    finish: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    variant_digest: str
    trace_id: str
    first_text_s: float
    total_s: float


def new_prompt() -> str:
    """A question nobody has asked: a worker that knows the prompt would not need to ask the cache."""
    return PROMPT.format(number=random.randrange(10, 10_000))


def ask(
    ingress: str, otlp: str, model: str, on_text: Callable[[str], None], prompt: str = "", timeout_s: float = 60.0
) -> Answer:
    """Streams one answer; `on_text` gets each piece. Raises `NoAnswer`."""
    provider = TracerProvider(resource=Resource.create({"service.name": CLIENT}))
    provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(endpoint=otlp, insecure=True, timeout=5)))
    span = provider.get_tracer("autoglm.mesh.demo").start_span("chat", kind=SpanKind.CLIENT)
    context = span.get_span_context()
    trace_id = f"{context.trace_id:032x}"
    traceparent = f"00-{trace_id}-{context.span_id:016x}-01"
    pieces: list[str] = []
    finish, first_s = "", 0.0
    done: Done | None = None
    began = time.monotonic()
    try:
        with (
            Client(ingress, model=model, timeout=timeout_s) as client,
            client.stream(
                messages=[{"role": "user", "content": prompt or new_prompt()}],
                max_tokens=MAX_TOKENS,
                seed=SEED,
                temperature=TEMPERATURE,
                metadata={"traceparent": traceparent},
            ) as stream,
        ):
            for event in stream:
                if isinstance(event, Delta) and event.text:
                    first_s = first_s or time.monotonic() - began
                    pieces.append(event.text)
                    on_text(event.text)
                elif isinstance(event, Finish):
                    finish = event.reason
                elif isinstance(event, Done):
                    done = event
    except AutoglmError as error:
        span.set_status(Status(StatusCode.ERROR, str(error)))
        raise NoAnswer(f"{error}  (trace {trace_id})") from error
    finally:
        span.end()
        provider.shutdown()
    if done is None:
        raise NoAnswer(f"the stream ended without token counts  (trace {trace_id})")
    usage = done.usage
    return Answer(
        "".join(pieces),
        finish,
        usage.prompt_tokens,
        usage.completion_tokens,
        usage.cached_tokens,
        done.variant_digest,
        trace_id,
        first_s,
        time.monotonic() - began,
    )


def whole_trace(
    traces: str, trace_id: str, expected: Iterable[str], wait_s: float = TRACE_WAIT_S
) -> tuple[Tree, list[str]]:
    """Waits until every expected service has reported and no parent is missing. Returns the tree and who is missing."""
    wanted = list(expected)
    deadline = time.monotonic() + wait_s
    count, grown = 0, time.monotonic()
    while True:
        spans = fetch(traces, trace_id)
        now = time.monotonic()
        if len(spans) > count:
            count, grown = len(spans), now
        tree = build(spans)
        missing = [name for name in wanted if not any(service.startswith(name) for service in tree.services)]
        is_whole = tree.has_root and not tree.orphans
        if (is_whole and now - grown > (QUIET_S if missing else SETTLED_S)) or now > deadline:
            return tree, missing
        time.sleep(POLL_S)


def fetch(traces: str, trace_id: str) -> list[Span]:
    """The spans of a trace that have arrived; none yet is an empty list. Raises OSError when the sink is away."""
    answer = _get(traces, f"/traces/{trace_id}")
    return [Span.from_json(item) for item in answer.get("spans", [])]


def newest(traces: str, limit: int) -> list[dict[str, Any]]:
    """Summaries of the newest traces."""
    found: list[dict[str, Any]] = _get(traces, f"/traces?limit={limit}").get("traces", [])
    return found


def _get(address: str, path: str) -> dict[str, Any]:
    connection = http.client.HTTPConnection(address, timeout=5)
    try:
        connection.request("GET", path)
        answer = json.loads(connection.getresponse().read())
    except (http.client.HTTPException, ValueError) as error:
        raise OSError(f"the trace sink at {address}: {error!r}") from error
    finally:
        connection.close()
    return answer if isinstance(answer, dict) else {}
