"""The door on a real Envoy: gRPC-Web, pages of other origins, compression, and answers that Envoy gives by itself."""

import asyncio
import base64
import gzip
import json
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.mesh.policy import Policy, load
from services.mesh.registry import Endpoint, Registry, Service, ServicePort
from services.mesh.translate import NodeSettings, translate
from tests.fakes.echo_upstream import EchoUpstream
from tests.fakes.envoy_process import EnvoyProcess, node_settings

ISTIO = Path(__file__).resolve().parents[2] / "istio"
ORIGIN = "https://chat.example.com"
CORS = {
    "allowOrigins": [{"exact": ORIGIN}],
    "allowMethods": ["GET", "POST"],
    "allowHeaders": ["content-type", "x-grpc-web"],
    "exposeHeaders": ["grpc-status", "grpc-message"],
    "maxAge": "24h",
    "unmatchedPreflights": "IGNORE",
}
BODY = json.dumps({"words": ["token"] * 800}).encode()


def registry(grpc_port: int, rest_port: int) -> Registry:
    """The base services, with a gateway on these two ports."""
    ports = (ServicePort("grpc", 50051, "grpc"), ServicePort("rest", 8000, "http"))
    here = {"grpc": (Endpoint("127.0.0.1", grpc_port),), "rest": (Endpoint("127.0.0.1", rest_port),)}
    others = ("tokenizer", "scheduler", "cache", "sparse-inference")
    return Registry(
        (
            Service("gateway", "autoglm", ports, here, {"app": "gateway"}),
            *(Service(name, "autoglm", ports[:1], {}, {"app": name}) for name in others),
        )
    )


def door(change: Callable[[list[dict[str, Any]]], None] = lambda routes: None, *folders: str) -> Policy:
    """`istio/base` with the components in `folders` that only add objects, and the door's routes changed."""
    policy = load(ISTIO / "base")
    changed = []
    for service in policy.virtual_services:
        data = service.model_dump(mode="json", by_alias=True, exclude_unset=True)
        if service.metadata.name == "ingress":
            change(data["spec"]["http"])
        changed.append(type(service).model_validate_json(json.dumps(data)))
    added = [load(ISTIO / "components" / folder) for folder in folders]
    filters = tuple(item for more in added for item in more.envoy_filters)
    return replace(policy, virtual_services=tuple(changed), envoy_filters=filters)


class Rest:
    """A REST service over HTTP/1.1: JSON at once, or an event stream that goes on when told to."""

    def __init__(self) -> None:
        self.port = 0
        self.seen: list[str] = []
        self.more = asyncio.Event()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                path = head.split(b" ", 2)[1].decode()
                self.seen.append(f"{head.split(b' ', 1)[0].decode()} {path}")
                if path == "/v1/events":
                    writer.write(
                        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
                    )
                    for number in range(2):
                        event = b"data: %d\n\n" % number
                        writer.write(b"%x\r\n%s\r\n" % (len(event), event))
                        await writer.drain()
                        if number == 0:
                            await self.more.wait()
                    writer.write(b"0\r\n\r\n")
                else:
                    writer.write(
                        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s"
                        % (len(BODY), BODY)
                    )
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def served(policy: Policy, directory: Path) -> AsyncIterator[tuple[NodeSettings, Rest, EchoUpstream]]:
    """Envoy under `policy` with a gateway of two fakes behind it."""
    rest = Rest()
    server = await asyncio.start_server(rest.answer, "127.0.0.1", 0)
    rest.port = server.sockets[0].getsockname()[1]
    node = node_settings(directory)
    async with EchoUpstream("gateway") as grpc_side:
        async with EnvoyProcess(translate(policy, registry(grpc_side.port, rest.port), node), node):
            yield node, rest, grpc_side
    server.close()


def frames(body: bytes) -> list[tuple[int, bytes]]:
    """The frames of a gRPC-Web body: flag and content."""
    found = []
    while body:
        flag, size = struct.unpack(">BI", body[:5])
        found.append((flag, body[5 : 5 + size]))
        body = body[5 + size :]
    return found


async def test_a_browser_calls_grpc_over_http_1(tmp_path: Path) -> None:
    """gRPC-Web: the service sees plain gRPC, the caller gets message and trailers in one HTTP/1.1 body."""
    message = b"\x00" + struct.pack(">I", 5) + b"hello"
    method = "/autoglm.gateway.v1.GatewayService/Say"
    async with served(door(), tmp_path) as (node, _, upstream), httpx.AsyncClient() as client:
        url = f"http://127.0.0.1:{node.ingress_port}{method}"
        headers = {"content-type": "application/grpc-web+proto", "x-grpc-web": "1", "x-autoglm-tenant": "forged"}
        reply = await client.post(url, content=message, headers=headers)
        assert (reply.status_code, reply.http_version) == (200, "HTTP/1.1")
        assert reply.headers["content-type"].startswith("application/grpc-web")
        (data_flag, data), (trailer_flag, trailers) = frames(reply.content)
        assert (data_flag, data) == (0, b"gateway")
        assert trailer_flag == 0x80 and b"grpc-status:0" in trailers.replace(b" ", b"")
        as_text = {"content-type": "application/grpc-web-text", "accept": "application/grpc-web-text"}
        text = await client.post(url, content=base64.b64encode(message), headers=headers | as_text)
        assert frames(base64.b64decode(text.content[:16])) == [(0, b"gateway")]  # each frame is encoded apart
        wrong = await client.post(
            f"http://127.0.0.1:{node.ingress_port}/autoglm.gateway.v1.GatewayService/Nothing",
            content=message,
            headers=headers,
        )
        assert wrong.headers.get("grpc-status") == "12" or b"grpc-status:12" in wrong.content.replace(b" ", b"")
    assert upstream.bodies == [b"hello", b"hello"]
    assert "x-autoglm-tenant" not in upstream.metadata[0]


async def test_only_pages_of_a_named_origin_may_call(tmp_path: Path) -> None:
    """Preflights are answered by Envoy; another origin gets no permission, a route without corsPolicy gives none."""

    def allow(routes: list[dict[str, Any]]) -> None:
        for route in routes:
            if route["name"] == "rest":
                route["corsPolicy"] = CORS

    preflight = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    async with served(door(allow), tmp_path) as (node, rest, _), httpx.AsyncClient() as client:
        base = f"http://127.0.0.1:{node.ingress_port}"
        asked = await client.options(f"{base}/v1/completions", headers={"origin": ORIGIN, **preflight})
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == ORIGIN
        assert asked.headers["access-control-allow-methods"] == "GET,POST"
        assert asked.headers["access-control-max-age"] == "86400"
        assert rest.seen == []
        called = await client.get(f"{base}/v1/models", headers={"origin": ORIGIN})
        assert called.headers["access-control-allow-origin"] == ORIGIN
        assert called.headers["access-control-expose-headers"] == "grpc-status,grpc-message"
        for origin in ("https://evil.example.com", "https://chat.example.com.evil", "null"):
            stranger = await client.options(f"{base}/v1/completions", headers={"origin": origin, **preflight})
            assert "access-control-allow-origin" not in stranger.headers
        assert [line for line in rest.seen if line.startswith("OPTIONS")] == []
        sticky = await client.get(f"{base}/v1/models", headers={"origin": ORIGIN, "x-conversation-id": "7"})
        assert "access-control-allow-origin" not in sticky.headers


@pytest.mark.parametrize(
    ("accepts", "encoding"), [("gzip", "gzip"), ("zstd", "zstd"), ("gzip, zstd", "zstd"), ("br", None), ("", None)]
)
async def test_whole_json_answers_are_compressed_as_the_caller_likes(
    tmp_path: Path, accepts: str, encoding: str | None
) -> None:
    """zstd before gzip, nothing for those who ask for nothing, and the content is the same."""
    async with (
        served(door(lambda routes: None, "compression"), tmp_path) as (node, _, _),
        httpx.AsyncClient() as client,
    ):
        url = f"http://127.0.0.1:{node.ingress_port}/v1/models"
        async with client.stream("GET", url, headers={"accept-encoding": accepts}) as reply:
            raw = b"".join([piece async for piece in reply.aiter_raw()])
        assert reply.headers.get("content-encoding") == encoding
        assert (len(raw) < len(BODY) / 10) is (encoding is not None)
        if encoding == "gzip":
            assert gzip.decompress(raw) == BODY
        if encoding is None:
            assert raw == BODY


async def test_streams_are_never_compressed_or_held_back(tmp_path: Path) -> None:
    """An event and a gRPC message arrive while the answer is still open, whatever the caller accepts."""
    method = "/autoglm.gateway.v1.GatewayService/Stream"
    message = b"\x00" + struct.pack(">I", 0)
    policy = door(lambda routes: None, "compression")
    async with served(policy, tmp_path) as (node, rest, upstream), httpx.AsyncClient(timeout=20) as client:
        base = f"http://127.0.0.1:{node.ingress_port}"
        async with client.stream("GET", f"{base}/v1/events", headers={"accept-encoding": "gzip, zstd"}) as reply:
            assert "content-encoding" not in reply.headers
            pieces = reply.aiter_raw()
            assert await anext(pieces) == b"data: 0\n\n"
            rest.more.set()
            assert await anext(pieces) == b"data: 1\n\n"
        headers = {"content-type": "application/grpc-web+proto", "accept-encoding": "gzip, zstd"}
        async with client.stream("POST", base + method, content=message, headers=headers) as reply:
            assert "content-encoding" not in reply.headers
            pieces = reply.aiter_raw()
            assert frames(await anext(pieces)) == [(0, b"gateway")]
            upstream.release(is_last=True)
            assert b"grpc-status" in b"".join([piece async for piece in pieces])


async def test_envoy_answers_by_itself_where_the_policy_says_so(tmp_path: Path) -> None:
    """A redirect, a direct answer and a rewritten path."""

    def change(routes: list[dict[str, Any]]) -> None:
        to_rest = [{"destination": {"host": "gateway", "port": {"number": 8000}}}]
        routes[:0] = [
            {"match": [{"uri": {"exact": "/v1/old"}}], "redirect": {"uri": "/v1/models", "redirectCode": 308}},
            {"match": [{"uri": {"exact": "/robots.txt"}}], "directResponse": {"status": 200, "body": {"string": "no"}}},
            {
                "match": [{"uri": {"prefix": "/api/"}}],
                "route": to_rest,
                "rewrite": {"uriRegexRewrite": {"match": "^/api/([a-z]+)", "rewrite": "/v1/\\1"}},
            },
        ]

    async with served(door(change), tmp_path) as (node, rest, _), httpx.AsyncClient() as client:
        base = f"http://127.0.0.1:{node.ingress_port}"
        moved = await client.post(f"{base}/v1/old")
        assert (moved.status_code, moved.headers["location"].removeprefix(base)) == (308, "/v1/models")
        direct = await client.get(f"{base}/robots.txt")
        assert (direct.status_code, direct.text) == (200, "no")
        assert rest.seen == []
        assert (await client.get(f"{base}/api/models")).status_code == 200
        assert rest.seen == ["GET /v1/models"]
