"""What Envoy itself answers, on a real Envoy: REST callers get OpenAI's error shape, gRPC callers Envoy's own."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio

from services.mesh.issuer import AUDIENCE, JWKS_URI, Issuer
from services.mesh.keys import Keys
from services.mesh.policy import Policy, load
from services.mesh.registry import Endpoint, Registry, Service, ServicePort, Workload, spiffe_id
from services.mesh.translate import translate
from tests.fakes.access_world import AccessWorld, Asked, Reply
from tests.fakes.envoy_process import EnvoyProcess, free_port, node_settings

in_one_loop = pytest.mark.asyncio(loop_scope="module")

ISTIO = Path(__file__).resolve().parents[2] / "istio"
GRPC, REST = ServicePort("grpc", 50051, "grpc"), ServicePort("rest", 8000, "http")
IS_GRPC = {"content-type": "application/grpc"}
OVERLAY = """
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
resources: [../istio/base]
components: [../istio/components/jwt, ../istio/components/ratelimit]
patches:
  - target: {kind: VirtualService, name: ingress}
    patch: |-
      - op: add
        path: /spec/http/0
        value:
          name: slow
          match: [{uri: {prefix: /v1/slow}}]
          timeout: 0.2s
          route: [{destination: {host: gateway, port: {number: 8000}}}]
      - op: add
        path: /spec/http/0
        value:
          name: nobody
          match: [{uri: {prefix: /v1/nobody}}]
          route: [{destination: {host: scheduler}}]
      - op: add
        path: /spec/http/0
        value:
          name: dead
          match: [{uri: {prefix: /v1/dead}}]
          route: [{destination: {host: cache}}]
          retries: {attempts: 0}
      - op: add
        path: /spec/http/0
        value:
          name: odd
          match: [{uri: {prefix: /v1/odd}}]
          route: [{destination: {host: gateway, port: {number: 8000}}}]
          fault: {abort: {percentage: {value: 100}, httpStatus: 418}}
      - op: add
        path: /spec/http/0
        value:
          name: broken
          match: [{uri: {prefix: /v1/broken}}]
          route: [{destination: {host: gateway, port: {number: 8000}}}]
          fault: {abort: {percentage: {value: 100}, httpStatus: 502}}
      - op: add
        path: /spec/http/0
        value:
          name: full
          match: [{uri: {prefix: /v1/full}}]
          route: [{destination: {host: tokenizer}}]
  - target: {kind: DestinationRule, name: tokenizer}
    patch: |-
      - op: add
        path: /spec/trafficPolicy/connectionPool
        value: {http: {http2MaxRequests: 1}}
  - target: {kind: EnvoyFilter, name: request-rate}
    patch: |-
      - op: add
        path: /spec/configPatches/1/patch/value/typed_per_filter_config/envoy.filters.http.local_ratelimit/descriptors/-
        value:
          entries: [{key: tenant, value: tight}]
          token_bucket: {max_tokens: 1, tokens_per_fill: 1, fill_interval: 1s}
      - op: replace
        path: /spec/configPatches/1/patch/value/typed_per_filter_config/envoy.filters.http.local_ratelimit/token_bucket
        value: {max_tokens: 2, tokens_per_fill: 1, fill_interval: 1s}
"""


def policy_in(directory: Path) -> Policy:
    """The base with tokens and rate limits, and routes to what is slow, dead, full, broken or not there."""
    shutil.copytree(ISTIO, directory / "istio")
    (directory / "overlay").mkdir()
    (directory / "overlay" / "kustomization.yaml").write_text(OVERLAY)
    return load(directory / "overlay")


@dataclass(frozen=True)
class Door:
    """A running door, its issuer, and how often the full service was reached."""

    url: str
    issuer: Issuer
    hanging: asyncio.Semaphore

    def bearer(self, tenant: str = "acme") -> dict[str, str]:
        token = self.issuer.token(tenant, AUDIENCE, timedelta(minutes=5), datetime.now(UTC))
        return {"authorization": f"Bearer {token}"}

    async def ask(self, path: str, headers: dict[str, str], method: str = "POST") -> httpx.Response:
        async with httpx.AsyncClient(base_url=self.url, timeout=20) as client:
            return await client.request(method, path, headers=headers)

    async def rush(self, path: str, headers: dict[str, str]) -> list[httpx.Response]:
        """More at once than a bucket of one a second lets through, however slow the machine."""
        return await asyncio.gather(*(self.ask(path, headers) for _ in range(24)))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def door(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Door]:
    """A real Envoy; behind it servers that take every request and answer none."""
    directory = tmp_path_factory.mktemp("refusals")
    issuer, hanging = Issuer.open(directory / "issuer"), asyncio.Semaphore(0)

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async def fill(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hanging.release()
        await hang(reader, writer)

    server, full = await asyncio.start_server(hang, "127.0.0.1", 0), await asyncio.start_server(fill, "127.0.0.1", 0)
    here, there = ((Endpoint("127.0.0.1", one.sockets[0].getsockname()[1]),) for one in (server, full))
    gone = (Endpoint("127.0.0.1", free_port()),)
    registry = Registry(
        (
            Service("gateway", "autoglm", (GRPC, REST), {"grpc": here, "rest": here}, {"app": "gateway"}),
            Service("tokenizer", "autoglm", (GRPC,), {"grpc": there}, {"app": "tokenizer"}),
            Service("cache", "autoglm", (GRPC,), {"grpc": gone}, {"app": "cache"}),
            *(Service(name, "autoglm", (GRPC,), {}, {"app": name}) for name in ("scheduler", "sparse-inference")),
        )
    )
    policy = await Keys({JWKS_URI: lambda: issuer.jwks}).filled(policy_in(directory))
    node = replace(node_settings(directory), request_headers_timeout_s=0.3)
    async with server, full, EnvoyProcess(translate(policy, registry, node), node):
        yield Door(f"http://127.0.0.1:{node.ingress_port}", issuer, hanging)


def said(answer: httpx.Response) -> dict[str, Any]:
    """The error in OpenAI's shape, and nothing else."""
    assert answer.headers["content-type"] == "application/json", answer.text
    body = json.loads(answer.text)
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert "127.0.0.1" not in answer.text and "upstream" not in answer.text and "autoglm.svc" not in answer.text
    error: dict[str, Any] = body["error"]
    assert error["param"] is None and len(error["message"]) > 20
    return error


@in_one_loop
async def test_a_missing_token_and_a_bad_one(door: Door) -> None:
    """Both are 401, with what is missing or wrong; a good one that says too little is a 403."""
    missing = await door.ask("/v1/models", {}, "GET")
    assert (missing.status_code, said(missing)["code"]) == (401, "missing_token")
    assert "authorization: Bearer" in said(missing)["message"] and missing.headers["www-authenticate"] == "Bearer"
    assert len(missing.headers["x-request-id"]) == 36
    bad = await door.ask("/v1/models", {"authorization": "Bearer a.b.c"}, "GET")
    assert (bad.status_code, said(bad)["code"]) == (401, "invalid_token") and "Jwt" in said(bad)["message"]
    late = door.issuer.token("acme", AUDIENCE, timedelta(minutes=-5), datetime.now(UTC) - timedelta(minutes=10))
    expired = await door.ask("/v1/models", {"authorization": f"Bearer {late}"}, "GET")
    assert expired.status_code == 401 and "expired" in said(expired)["message"]
    other = door.issuer.token("acme", "somebody-else", timedelta(minutes=5), datetime.now(UTC))
    denied = await door.ask("/v1/models", {"authorization": f"Bearer {other}"}, "GET")
    assert (denied.status_code, said(denied)["code"]) == (403, "access_denied") and "aud" in said(denied)["message"]


@in_one_loop
@pytest.mark.parametrize(
    ("path", "status", "kind", "code"),
    [
        ("/etc/passwd", 404, "invalid_request_error", "not_found"),
        ("/v1/slow", 504, "server_error", "out_of_time"),
        ("/v1/nobody", 503, "server_error", "unavailable"),
        ("/v1/dead", 503, "server_error", "unavailable"),
        ("/v1/broken", 502, "server_error", "internal_error"),
        ("/v1/odd", 418, "invalid_request_error", "refused"),
    ],
)
async def test_what_cannot_be_served(door: Door, path: str, status: int, kind: str, code: str) -> None:
    """Each with its own code and the text that helps; nothing of what stands behind the door is told."""
    answer = await door.ask(path, door.bearer())
    error = said(answer)
    assert (answer.status_code, error["type"], error["code"]) == (status, kind, code)


@in_one_loop
async def test_too_many_requests_say_when_to_come_back(door: Door) -> None:
    """In the header and in the text, which OpenAI's client shows."""
    answers = await door.rush("/v1/nobody", door.bearer("tight"))
    limited = next(answer for answer in answers if answer.status_code == 429)
    assert (said(limited)["type"], said(limited)["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert limited.headers["retry-after"] == "1" and "after 1 s" in said(limited)["message"]


@in_one_loop
async def test_no_room(door: Door) -> None:
    """A full pool is told from one that nobody is in: it is worth trying again."""
    async with httpx.AsyncClient(base_url=door.url, timeout=30) as client:
        first = asyncio.create_task(client.post("/v1/full", headers=door.bearer()))
        await door.hanging.acquire()
        while (full := await door.ask("/v1/full", door.bearer())).status_code != 503:
            pass  # Envoy counts the first once its connection is up
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
    assert said(full)["code"] == "too_busy"


@in_one_loop
async def test_what_is_no_request_at_all(door: Door) -> None:
    """Headers that are too large, and headers that never end."""
    large = await door.ask("/v1/models", {"x": "y" * 70_000})
    assert (large.status_code, said(large)["code"]) == (431, "headers_too_large")
    host, port = door.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET /v1/models HTTP/1.1\r\nhost: mesh\r\n")
    raw = (await reader.read()).decode()
    writer.close()
    assert (
        raw.startswith("HTTP/1.1 408")
        and json.loads(raw.partition("\r\n\r\n")[2])["error"]["code"] == "request_timeout"
    )


@in_one_loop
async def test_grpc_callers_get_their_status_and_envoys_own_text(door: Door) -> None:
    """Trailers-only answers: no JSON in grpc-message, and no status that became another one."""
    seen = {}
    for path, headers in (
        ("/v1/models", {}),
        ("/v1/dead/1", {"authorization": "Bearer a.b.c"}),
        ("/etc/passwd", door.bearer()),
        ("/v1/nobody", door.bearer()),
        ("/v1/slow", door.bearer()),
    ):
        answer = await door.ask(path, headers | IS_GRPC)
        assert answer.status_code == 200 and answer.headers["content-type"] == "application/grpc"
        seen[path] = (answer.headers["grpc-status"], answer.headers.get("grpc-message", ""))
    assert seen == {
        "/v1/models": ("7", "RBAC: access denied"),
        "/v1/dead/1": ("16", "Jwt header is an invalid Base64url encoded"),
        "/etc/passwd": ("12", ""),
        "/v1/nobody": ("14", "no healthy upstream"),
        "/v1/slow": ("14", "upstream request timeout"),
    }
    limited = await door.rush("/v1/nobody", door.bearer("tight") | IS_GRPC)
    assert "8" in {answer.headers["grpc-status"] for answer in limited}
    web = await door.ask("/v1/models", {"content-type": "application/grpc-web+proto"})
    assert (web.status_code, web.text) == (403, "RBAC: access denied")


@in_one_loop
async def test_openais_client_shows_them(door: Door) -> None:
    """As its own exceptions, with code and message."""
    async with openai.AsyncOpenAI(base_url=f"{door.url}/v1", api_key="a.b.c", max_retries=0, timeout=20) as client:
        with pytest.raises(openai.AuthenticationError) as refused:
            await client.models.list()
    assert refused.value.code == "invalid_token" and "The token is not accepted" in refused.value.message
    assert refused.value.request_id


def test_the_gateways_own_proxy_speaks_the_same(tmp_path: Path) -> None:
    """What is no part of the API is refused behind the door: for REST in the same shape."""
    policy = load(ISTIO / "base")
    world = AccessWorld(tmp_path)
    gateway = world.sidecar(policy, Workload("gateway-0", "autoglm", "gateway", {"app": "gateway"}))
    cache = world.sidecar(policy, Workload("cache-0", "autoglm", "cache", {"app": "cache"}))
    world.start()
    try:
        caller = world.caller(spiffe_id("autoglm", "ingress"))
        grpc = (("content-type", "application/grpc"),)
        asked = [Asked("POST", "/v1/nothing"), Asked("POST", "/a.B/C", grpc), Asked("GET", "/v1/completions")]
        rest, call, wrong = world.ask(gateway, caller, asked)
        (other,) = world.ask(cache, caller, [Asked("POST", "/v1/nothing")])
    finally:
        world.stop()
    assert _error(rest)["code"] == "access_denied" and _error(rest)["message"].startswith("POST is not served")
    assert wrong.status == 403 and _error(wrong)["message"].startswith("GET is not served")
    assert (call.headers["grpc-status"], call.headers["grpc-message"]) == ("7", "RBAC: access denied")
    assert (other.status, other.body) == (403, "RBAC: access denied")


def _error(reply: Reply) -> dict[str, str]:
    assert reply.status == 403
    error: dict[str, str] = json.loads(reply.body)["error"]
    return error
