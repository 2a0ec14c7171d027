"""The OpenAI-style REST API: its routes, health and metrics; every failure has OpenAI's shape."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from services.chassis.errors import ServiceError
from services.gateway.generation import Gateway
from services.gateway.rest.completions import Completions
from services.gateway.rest.errors import ApiError, told
from services.gateway.rest.render import ChatRenderer, Json, TextRenderer, encode, model_card
from services.gateway.rest.schemas import ChatBody, CompletionBody


def build(gateway: Gateway, new_id: Callable[[], str], now: Callable[[], float]) -> Starlette:
    """The application; see `Completions` for what `new_id` and `now` give."""

    async def models(_: Request) -> Response:
        cards = [model_card(model) for model in await gateway.catalogue.all()]
        return _json(200, {"object": "list", "data": cards})

    async def model(request: Request) -> Response:
        if not (name := request.path_params["name"]):
            raise HTTPException(404)  # /v1/models/ names no model
        return _json(200, model_card(await gateway.catalogue.get(name)))

    async def live(_: Request) -> Response:
        return _json(200, {"status": "ok"})

    async def health(_: Request) -> Response:
        timeout_s = gateway.settings.health_timeout_s
        answers = await asyncio.gather(
            gateway.workers.describe(timeout_s), gateway.tokenizer.ping(timeout_s), return_exceptions=True
        )
        peers = {
            name: "unreachable" if isinstance(answer, BaseException) else "ok"
            for name, answer in zip(("sparse-inference", "tokenizer"), answers, strict=True)
        }
        is_well = set(peers.values()) == {"ok"}
        return _json(200 if is_well else 503, {"status": "ok" if is_well else "unavailable", "peers": peers})

    async def metrics(_: Request) -> Response:
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    chat = Completions(gateway, ChatBody, ChatRenderer, new_id, now)
    text = Completions(gateway, CompletionBody, TextRenderer, new_id, now)
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/completions", text, methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/health", health),
            Route("/live", live),
            Route("/metrics", metrics),
        ],
        exception_handlers={HTTPException: _http_error, ServiceError: _failure, Exception: _failure},
    )
    app.router.redirect_slashes = False
    return app


async def _http_error(request: Request, failure: Exception) -> Response:
    assert isinstance(failure, HTTPException)
    what = {404: f"there is no {request.url.path[:128]}", 405: f"{request.method} is not allowed here"}
    message = what.get(failure.status_code, failure.detail)
    code = {404: "unknown_path", 405: "method_not_allowed"}.get(failure.status_code)
    return _error(ApiError(failure.status_code, message, code=code, headers=failure.headers))


async def _failure(_: Request, failure: Exception) -> Response:
    return _error(told(failure))


def _error(error: ApiError) -> Response:
    return _json(error.status, error.body, error.headers)


def _json(status: int, body: Json, headers: dict[str, str] | None = None) -> Response:
    return Response(encode(body), status, headers, "application/json")
