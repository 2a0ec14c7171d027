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
from pathlib import Path
from typing import Any

import grpc
from autoglm import AutoglmError, Client, Delta, Done, Finish
from autoglm.cli.spans import Span, Tree, build
from autoglm.tokenizer.v1 import tokenizer_pb2, tokenizer_pb2_grpc
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode

from services.mesh.settings import BUNDLED_MODEL
from services.mesh.state import MeshState

PROMPT = "Write a Python function `close_{number}`. Close the file and release the lock."
OWN_PROMPT = "Tell me in two sentences what is special about the number {number}."
PLAIN_PROMPT = "The number {number} is special because"
"""For a model of one's own: with a chat template, and without one."""
MAX_TOKENS = 64
SEED = 7
TEMPERATURE = 0.4
TRACE_WAIT_S = 10.0
SETTLED_S = 0.45
"""Two export intervals without news: leaves that nobody misses have come by then."""
PATIENCE_S = 600.0
"""For an answer of a model that may be large."""
QUIET_S = 2.0
"""Ten intervals without news: whoever is still missing took no part."""
POLL_S = 0.05
CLIENT = "client"


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked: as a chat message, or as a text to continue."""

    text: str
    is_chat: bool = True


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


def new_question(state: MeshState | None = None) -> Question:
    """A question nobody has asked: a worker that knows the prompt would not need to ask the cache.

    With `state`, one that suits the model of that mesh. Raises `NoAnswer` when its tokenizer does not say what it can.
    """
    number = random.randrange(10, 10_000)
    if state is None or Path(state.model_dir) == BUNDLED_MODEL.absolute():
        return Question(PROMPT.format(number=number))
    is_chat = _has_chat_template(state)
    return Question((OWN_PROMPT if is_chat else PLAIN_PROMPT).format(number=number), is_chat)


def _has_chat_template(state: MeshState) -> bool:
    ports = [item.ports["grpc"] for item in state.processes if item.service == "tokenizer" and "grpc" in item.ports]
    for port in ports:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
            try:
                answer = stub.ListTokenizers(tokenizer_pb2.ListTokenizersRequest(), timeout=10)
            except grpc.RpcError as error:
                raise NoAnswer(f"the tokenizer at port {port}: {error}") from error
        return any(item.model == state.model and item.has_chat_template for item in answer.tokenizers)
    return True


def ask(
    ingress: str,
    otlp: str,
    model: str,
    on_text: Callable[[str], None],
    question: Question | None = None,
    timeout_s: float = 60.0,
) -> Answer:
    """Streams one answer; `on_text` gets each piece. Raises `NoAnswer`."""
    question = question or new_question()
    asked: dict[str, Any] = {"prompt": question.text}
    if question.is_chat:
        asked = {"messages": [{"role": "user", "content": question.text}]}
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
                **asked,
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
