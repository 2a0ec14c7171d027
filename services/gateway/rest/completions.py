"""POST /v1/completions and /v1/chat/completions: JSON in; one JSON answer or server-sent events out.

All work for a request ends as soon as its client has gone. The HTTP status waits for the first event, so a refusal by
a worker is a status and not a broken stream; what fails later is told inside the stream, which then has no [DONE].
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from opentelemetry import propagate, trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from prometheus_client import Counter
from pydantic import ValidationError
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from services.chassis import deadlines, residency
from services.gateway.budgets.words import spoken
from services.gateway.generation import Gateway, Generation
from services.gateway.rest.connection import ClientGone, Reply, read_body, while_connected
from services.gateway.rest.errors import from_validation, told
from services.gateway.rest.render import DONE, Renderer, sse
from services.gateway.rest.schemas import ChatBody, CompletionBody
from services.gateway.tenancy import TENANT_HEADER, tenant_of

READER_GRACE_S = 1.0
"""A client that stops reading is cut this long after its deadline."""

RESPONSES = Counter(
    "autoglm_gateway_rest_responses_total",
    "REST completions by path and HTTP status; 499 when the client went before there was one",
    ["path", "status"],
)

_TRACER = trace.get_tracer("autoglm.gateway")  # a proxy until telemetry starts


class Completions:
    """One endpoint, as an ASGI application. `new_id` names a request, `now` is the time in seconds since 1970."""

    def __init__(
        self,
        gateway: Gateway,
        body: type[ChatBody] | type[CompletionBody],
        renderer: type[Renderer],
        new_id: Callable[[], str],
        now: Callable[[], float],
    ) -> None:
        self._gateway, self._body, self._renderer = gateway, body, renderer
        self._new_id, self._now = new_id, now

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request, request_id = Request(scope, receive), self._new_id()
        settings = self._gateway.settings
        deadlines.start(settings.default_deadline_s)
        residency.start(request.headers.get(residency.HEADER))
        with _server_span(request) as span:
            reply = Reply(send, {"x-request-id": request_id, "x-trace-id": f"{span.get_span_context().trace_id:032x}"})
            try:
                content = await read_body(request, settings.max_body_bytes, settings.body_timeout_s)
                tenant = tenant_of(request.headers.getlist(TENANT_HEADER), settings.tenant)
                body = self._body.model_validate_json(content)
                async with asyncio.timeout(settings.default_deadline_s + READER_GRACE_S):
                    await while_connected(receive, self._serve(body, request_id, tenant, reply))
            except ClientGone:
                span.set_status(Status(StatusCode.ERROR, "the client closed the connection"))
            except Exception as failure:
                await _fail(reply, failure, span)
            if reply.status is not None:
                span.set_attribute("http.response.status_code", reply.status)
            RESPONSES.labels(request.url.path, reply.status or 499).inc()  # the route matched: there are two paths

    async def _serve(self, body: ChatBody | CompletionBody, request_id: str, tenant: str, reply: Reply) -> None:
        wanted = body.request()
        renderer = self._renderer(
            request_id, wanted.model, int(self._now()), scored=wanted.logprobs, include_usage=body.include_usage
        )
        async with self._gateway.generate(wanted, request_id, tenant) as generation:
            if body.stream:
                await _stream(generation, renderer, reply)
            else:
                whole = renderer.whole([event async for event in generation])
                await reply.json(200, whole, spoken(generation.standing))


async def _stream(generation: Generation, renderer: Renderer, reply: Reply) -> None:
    async for event in generation:
        if chunks := renderer.chunks(event):
            await reply.stream(b"".join(map(sse, chunks)), spoken(generation.standing))
    await reply.stream(DONE)
    await reply.end()


async def _fail(reply: Reply, failure: Exception, span: Span) -> None:
    if isinstance(failure, ValidationError):
        failure = from_validation(failure.errors(include_url=False, include_input=False))
    error = told(failure)
    if error.status >= 500:
        span.set_status(Status(StatusCode.ERROR, error.code))
    if reply.has_begun:
        await reply.stream(sse(error.body))
        await reply.end()
    else:
        await reply.json(error.status, error.body, error.headers)


@contextmanager
def _server_span(request: Request) -> Iterator[Span]:
    """The request's server span; continues the caller's trace."""
    path = request.url.path
    with _TRACER.start_as_current_span(
        f"{request.method} {path}",
        context=propagate.extract(dict(request.headers)),
        kind=SpanKind.SERVER,
        attributes={"http.request.method": request.method, "http.route": path},
    ) as span:
        yield span
