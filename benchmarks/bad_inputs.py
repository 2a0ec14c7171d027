"""Bad inputs over REST and gRPC, each with the answer it must get: quickly, typed, and with every process alive after.

The table is data; tests/faults runs the same one.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import httpx
from autoglm.gateway.v1 import gateway_pb2 as pb
from autoglm.gateway.v1 import gateway_pb2_grpc as rpc

from benchmarks.harness import MODEL, Bar, Mesh

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
SLOW_MS = 2000.0
"""A refusal that takes longer than this is reported as missed. Generous: the machine may be busy."""


@dataclass(frozen=True)
class Rest:
    """One REST request and the status it must get; `says` must be in the error's text or code."""

    name: str
    status: int
    says: str
    path: str = TEXT
    body: Any = None
    raw: bytes | None = None
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Grpc:
    """One gRPC request and the code it must get; `says` must be in the details."""

    name: str
    code: grpc.StatusCode
    says: str
    request: pb.GenerateRequest | None = None
    raw: bytes | None = None
    method: str = "/autoglm.gateway.v1.GatewayService/Generate"


@dataclass(frozen=True)
class Answer:
    """What came back."""

    name: str
    over: str
    code: str
    text: str
    ms: float
    is_right: bool


def text(**changes: Any) -> dict[str, Any]:
    """A valid completion request with changes."""
    return {"model": MODEL, "prompt": "def f():\n", "max_tokens": 4} | changes


def chat(**changes: Any) -> dict[str, Any]:
    """A valid chat request with changes."""
    return {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4} | changes


REST: tuple[Rest, ...] = (
    Rest("body is not JSON", 400, "JSON", raw=b"{not json"),
    Rest("body is a list", 400, "", raw=b"[]"),
    Rest("empty body", 400, "", raw=b""),
    Rest("body is not UTF-8", 400, "", raw=b'{"model": "\xff\xfe"}'),
    Rest("JSON nested 10,000 deep", 400, "", raw=b"[" * 10_000),
    Rest("unknown model", 404, "model_not_found", body=text(model="gpt-9")),
    Rest("no model", 400, "model", body={"prompt": "x"}),
    Rest("no prompt", 400, "prompt", body={"model": MODEL}),
    Rest("prompt is a number", 400, "prompt", body=text(prompt=5)),
    Rest("prompt is empty list", 400, "prompt", body=text(prompt=[])),
    Rest("token id outside the vocabulary", 400, "4096", body=text(prompt=[4096])),
    Rest("negative token id", 400, "prompt", body=text(prompt=[-1])),
    Rest("lone surrogate in the prompt", 400, "", raw=b'{"model": "glm-tiny", "prompt": "\\ud800"}'),
    Rest("prompt longer than the context", 400, "context", body=text(prompt="x = 1\n" * 3000)),
    Rest("prompt of 2 MB", 400, "at most 1048576", body=text(prompt="x" * 2_000_000)),
    Rest("body of 9 MB", 413, "", body=text(prompt="x" * 9_000_000)),
    Rest("max_tokens is 0", 400, "max_tokens", body=text(max_tokens=0)),
    Rest("max_tokens is -1", 400, "max_tokens", body=text(max_tokens=-1)),
    Rest("max_tokens is 2^63", 400, "max_tokens", body=text(max_tokens=2**63)),
    Rest("max_tokens exceeds the context", 400, "context", body=text(max_tokens=100_000)),
    Rest("max_tokens is text", 400, "max_tokens", body=text(max_tokens="many")),
    Rest("temperature is NaN", 400, "", raw=b'{"model": "glm-tiny", "prompt": "x", "temperature": NaN}'),
    Rest("temperature is -1", 400, "temperature", body=text(temperature=-1)),
    Rest("top_p is 2", 400, "top_p", body=text(top_p=2)),
    Rest("n is 0", 400, "n", body=text(n=0)),
    Rest("n is 16,385", 400, "n", body=text(n=16_385)),
    Rest("seed is 2^64", 400, "seed", body=text(seed=2**64)),
    Rest("17 stop strings", 400, "stop", body=text(stop=["a"] * 17)),
    Rest("empty stop string", 400, "stop", body=text(stop=[""])),
    Rest("logit_bias of a word", 400, "logit_bias", body=text(logit_bias={"word": 1})),
    Rest("logprobs is 100", 400, "logprobs", body=text(logprobs=100)),
    Rest("no messages", 400, "messages", CHAT, chat(messages=[])),
    Rest("600 messages", 400, "messages", CHAT, chat(messages=[{"role": "user", "content": "x"}] * 600)),
    Rest("unknown role", 400, "role", CHAT, chat(messages=[{"role": "emperor", "content": "x"}])),
    Rest("message without content", 400, "content", CHAT, chat(messages=[{"role": "user"}])),
    Rest("tools", 400, "tools", CHAT, chat(tools=[{"type": "function", "function": {"name": "f"}}])),
    Rest("response_format without schema", 400, "response_format", CHAT, chat(response_format={"type": "json_schema"})),
    Rest("two constraints", 400, "exclude", body=text(guided_regex="a", guided_json={"type": "object"})),
    Rest("regex with a hole", 400, "regex", body=text(guided_regex="a[")),
    Rest("schema of no type", 400, "json_schema", body=text(guided_json={"type": "nothing"})),
    Rest("min_tokens above max_tokens", 400, "min_tokens", body=text(min_tokens=9, max_tokens=4)),
    Rest("unknown path", 403, "POST is not served", "/v1/nothing", {}),
    Rest("wrong method", 403, "GET is not served", method="GET"),
    Rest("path outside the API", 404, "not_found", "/etc/passwd", {}),
    Rest("headers of 70 kB", 431, "headers_too_large", headers={"x-long": "y" * 70_000}, body=text()),
    Rest("wrong content type", 415, "", raw=b"model=glm-tiny", headers={"content-type": "text/plain"}),
)


def generate(**changes: Any) -> pb.GenerateRequest:
    """A valid gRPC request with changes."""
    values: dict[str, Any] = {"model": MODEL, "text": "def f():\n", "max_tokens": 4} | changes
    return pb.GenerateRequest(**values)


def _sampling(**values: Any) -> pb.GenerateRequest:
    return generate(sampling=values)


INVALID = grpc.StatusCode.INVALID_ARGUMENT
GRPC: tuple[Grpc, ...] = (
    Grpc("no model", INVALID, "model", generate(model="")),
    Grpc("unknown model", grpc.StatusCode.NOT_FOUND, "gpt-9", generate(model="gpt-9")),
    Grpc("no prompt", INVALID, "prompt", pb.GenerateRequest(model=MODEL)),
    Grpc("empty chat", INVALID, "messages", pb.GenerateRequest(model=MODEL, chat=pb.Chat())),
    Grpc("no token ids", INVALID, "token_ids", pb.GenerateRequest(model=MODEL, token_ids=pb.TokenIds())),
    Grpc("token id 2^31", INVALID, "token_ids",
         pb.GenerateRequest(model=MODEL, token_ids=pb.TokenIds(token_ids=[2**31]))),
    Grpc("token id outside the vocabulary", INVALID, "5000",
         pb.GenerateRequest(model=MODEL, token_ids=pb.TokenIds(token_ids=[5000]))),
    Grpc("prompt longer than the context", INVALID, "context", generate(text="x = 1\n" * 3000)),
    Grpc("max_tokens 2^31", INVALID, "max_tokens", generate(max_tokens=2**31)),
    Grpc("temperature NaN", INVALID, "temperature", _sampling(temperature=float("nan"))),
    Grpc("temperature infinite", INVALID, "temperature", _sampling(temperature=float("inf"))),
    Grpc("top_p -1", INVALID, "top_p", _sampling(top_p=-1)),
    Grpc("seed 2^63", INVALID, "seed", _sampling(seed=2**63)),
    Grpc("17 choices", INVALID, "choices", generate(choices=17)),
    Grpc("stop string of 300 bytes", INVALID, "stop", generate(stop=["x" * 300])),
    Grpc("text of 1 MiB + 1", INVALID, "text", generate(text="x" * (1 << 20 | 1))),
    Grpc("not a protobuf message", INVALID, "protobuf", raw=b"\xff\xff\xff"),
    Grpc("length beyond the message", INVALID, "protobuf", raw=b"\x0a\xff\xff\xff\xff\x07"),
    Grpc("10,000 unknown fields", INVALID, "model", raw=b"\xf8\x7f\x01" * 10_000),
    Grpc("unknown method", grpc.StatusCode.PERMISSION_DENIED, "RBAC", raw=b"",
         method="/autoglm.gateway.v1.GatewayService/Nothing"),
    Grpc("a worker's method from outside", grpc.StatusCode.UNIMPLEMENTED, "", raw=b"",
         method="/autoglm.sparse_inference.v1.SparseInferenceService/Generate"),
)  # fmt: skip


async def send_rest(http: httpx.AsyncClient, case: Rest) -> Answer:
    """Sends one REST case."""
    content = case.raw if case.raw is not None else json.dumps(case.body).encode()
    began = time.perf_counter()
    headers = {"content-type": "application/json"} | case.headers
    response = await http.request(case.method, case.path, content=content, headers=headers)
    ms = (time.perf_counter() - began) * 1000
    said, is_shaped = response.text, True
    if not response.is_success:  # whoever refuses, the gateway or Envoy: one shape
        is_shaped = response.headers.get("content-type", "").startswith("application/json")
    if is_shaped:
        error = response.json().get("error")
        is_shaped = isinstance(error, dict) and {"message", "type", "param", "code"} <= set(error)
        said = f"{error.get('message')} [{error.get('param')}, {error.get('code')}]" if is_shaped else said
    is_right = response.status_code == case.status and case.says in said and is_shaped
    return Answer(case.name, f"REST {case.path}", str(response.status_code), said[:160], ms, is_right)


async def send_grpc(channel: grpc.aio.Channel, case: Grpc) -> Answer:
    """Sends one gRPC case."""
    data = case.raw if case.raw is not None else (case.request or pb.GenerateRequest()).SerializeToString()
    began = time.perf_counter()
    code, details = grpc.StatusCode.OK, ""
    try:
        async for _ in channel.unary_stream(case.method)(data, timeout=30):
            pass
    except grpc.aio.AioRpcError as error:
        code, details = error.code(), error.details() or ""
    ms = (time.perf_counter() - began) * 1000
    return Answer(case.name, "gRPC", code.name, details[:160], ms, code is case.code and case.says in details)


async def answers(mesh: Mesh) -> list[Answer]:
    """Every case of both tables, one after the other, through the ingress."""
    found: list[Answer] = []
    async with httpx.AsyncClient(base_url=f"http://{mesh.ingress}", timeout=30) as http:
        found += [await send_rest(http, case) for case in REST]
    options = [("grpc.max_send_message_length", 8 << 20)]
    async with grpc.aio.insecure_channel(mesh.ingress, options=options) as channel:
        found += [await send_grpc(channel, case) for case in GRPC]
    return found


def table(found: list[Answer]) -> Iterator[str]:
    """The answers as Markdown."""
    yield "| input | over | answer | text | ms |"
    yield "| --- | --- | --- | --- | --- |"
    for answer in found:
        said = answer.text.replace("|", "\\|").replace("\n", " ")
        mark = "" if answer.is_right else " ✗"
        yield f"| {answer.name} | {answer.over} | {answer.code}{mark} | {said} | {answer.ms:.0f} |"


async def drill(mesh: Mesh) -> tuple[list[Bar], dict[str, Any]]:
    """The whole table, then the process list compared and one good request."""
    before = {process.name: process.pid for process in mesh.state.processes}
    found = await answers(mesh)
    after = {process.name: process.pid for process in mesh.state.processes}
    async with grpc.aio.insecure_channel(mesh.ingress) as channel:
        good = [message async for message in rpc.GatewayServiceStub(channel).Generate(generate(), timeout=60)]
    print("\n".join(table(found)))
    right, slowest = sum(answer.is_right for answer in found), max(answer.ms for answer in found)
    bars = [
        Bar("bad inputs answered as they should be", f"{right}/{len(found)}", f"{len(found)}", right == len(found)),
        Bar("slowest refusal", f"{slowest:.0f} ms", f"≤{SLOW_MS:.0f} ms", slowest <= SLOW_MS),
        Bar("processes unchanged", str(before == after), "True", before == after),
        Bar("a good request after it", f"{len(good)} messages", ">0", len(good) > 0),
    ]
    return bars, {"answers": [vars(answer) for answer in found]}


if __name__ == "__main__":
    from benchmarks.harness import running

    with running() as started:
        asyncio.run(drill(started))
