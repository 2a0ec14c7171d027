"""Both rate limits where clients meet them: a real Envoy in front of a real gateway, tenants from verified tokens."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import autoglm
import httpx
import openai
import pytest
import pytest_asyncio
import yaml

from services.mesh.policy import load
from services.mesh.registry import Endpoint, Registry, Service, ServicePort
from services.mesh.translate import NodeSettings, Snapshot, translate
from tests.fakes.envoy_process import EnvoyProcess, node_settings
from tests.fakes.gateway_peers import MODEL, Peers, hangs, says
from tests.fakes.gateway_process import GatewayUnderTest, budget_book, gateway_over, listening_peers

pytestmark = pytest.mark.asyncio(loop_scope="module")

ISTIO = Path(__file__).resolve().parents[2] / "istio"
KEY = b"0123456789abcdef0123456789abcdef"
HOUR = 3600
BOOK = "version = 1\n[default]\ntokens_per_minute = 1\nburst_tokens = 60\n"
TEXT: dict[str, Any] = {"model": MODEL, "prompt": "hi", "max_tokens": 20}


def part(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


def token(tenant: str) -> str:
    """A JWT that names a tenant."""
    head = part(b'{"alg":"HS256","kid":"k"}') + "." + part(json.dumps({"iss": "tests", "tenant": tenant}).encode())
    return f"{head}.{part(hmac.digest(KEY, head.encode(), hashlib.sha256))}"


VERIFIES: dict[str, Any] = {
    "name": "envoy.filters.http.jwt_authn",
    "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication",
        "providers": {
            "tests": {
                "issuer": "tests",
                "local_jwks": {
                    "inline_string": json.dumps({"keys": [{"kty": "oct", "alg": "HS256", "kid": "k", "k": part(KEY)}]})
                },
                "claim_to_headers": [{"header_name": "x-autoglm-tenant", "claim_name": "tenant"}],
            }
        },
        "rules": [{"match": {"prefix": "/"}, "requires": {"requires_any": {"requirements": [
            {"provider_name": "tests"}, {"allow_missing": {}},
        ]}}}],
    },
}  # fmt: skip
"""What a RequestAuthentication with `outputClaimToHeaders` becomes, in the place where Istio puts it."""


def snapshot(directory: Path, gateway: GatewayUnderTest, node: NodeSettings, requests: int | None) -> Snapshot:
    """istio/base and the component, with `requests` an hour for each tenant."""
    policy = load(ISTIO / "base")
    if requests is not None:
        document = yaml.safe_load((ISTIO / "components" / "ratelimit" / "rate-limit.yaml").read_text())
        limit = document["spec"]["configPatches"][1]["patch"]["value"]["typed_per_filter_config"]
        limit = limit["envoy.filters.http.local_ratelimit"]
        bucket = {"max_tokens": requests, "tokens_per_fill": requests, "fill_interval": f"{HOUR}s"}
        limit["token_bucket"] = bucket
        limit["descriptors"] = [
            {"entries": [{"key": "tenant"}], "token_bucket": bucket},
            {"entries": [{"key": "tenant", "value": "vip"}], "token_bucket": bucket | {"max_tokens": 1000}},
        ]
        limit["response_headers_to_add"] = [
            {"header": {"key": "retry-after", "value": str(HOUR)}},
            {"header": {"key": "retry-after-ms", "value": str(HOUR * 1000)}},
        ]
        folder = directory / "limit"
        folder.mkdir(exist_ok=True)
        (folder / "limit.yaml").write_text(json.dumps(document))  # JSON is YAML, and without aliases
        policy = replace(policy, envoy_filters=load(folder).envoy_filters)
    rest = int(gateway.rest_url.rpartition(":")[2])
    endpoints = {
        "grpc": (Endpoint("127.0.0.1", gateway.service.grpc_port),),
        "rest": (Endpoint("127.0.0.1", rest),),
    }
    ports = ServicePort("grpc", 50051, "grpc"), ServicePort("rest", 8000, "http")
    services = [Service("gateway", "autoglm", ports, endpoints, {"app": "gateway"})]
    services += [
        Service(name, "autoglm", ports[:1]) for name in ("tokenizer", "scheduler", "cache", "sparse-inference")
    ]
    made = translate(policy, Registry(tuple(services)), node)
    for listener in made.listeners:
        if listener["name"] == "ingress":
            filters = listener["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"]
            filters.insert(0, VERIFIES)
    return made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[Peers]:
    async with listening_peers() as peers:
        yield peers


@pytest.fixture(scope="module")
def gateway(server: Peers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayUnderTest]:
    book = budget_book(tmp_path_factory, BOOK)
    with gateway_over(server.address, AUTOGLM_TOKEN_BUDGETS=str(book)) as one:
        yield one


@pytest.fixture
def peers(server: Peers) -> Peers:
    server.reset()
    server.scripts = [says("Hello")]
    return server


async def post(node: NodeSettings, tenant: str | None, **more: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {token(tenant)}"} if tenant is not None else {}
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{node.ingress_port}", timeout=20) as rest:
        return await rest.post("/v1/completions", json=TEXT | more, headers=headers | {"x-autoglm-tenant": "vip"})


async def test_each_tenant_has_its_own_requests(gateway: GatewayUnderTest, peers: Peers, tmp_path: Path) -> None:
    """Past its limit a tenant gets 429 or RESOURCE_EXHAUSTED and when to come back; others are served."""
    node = node_settings(tmp_path)
    async with EnvoyProcess(snapshot(tmp_path, gateway, node, 2), node):
        answers = [await post(node, "a") for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200, 200, 429, 429]
        assert answers[2].headers["retry-after"] == str(HOUR)
        assert answers[2].headers["x-ratelimit-limit"].startswith("2")
        assert len(peers.calls) == 2
        assert {call.request.tenant for call in peers.calls} == {"a"}
        assert (await post(node, "b")).status_code == 200

        target = f"127.0.0.1:{node.ingress_port}"
        async with autoglm.AsyncClient(target, token=token("a")) as sdk:
            with pytest.raises(autoglm.TooBusyError) as busy:
                await sdk.generate("hi", model=MODEL, max_tokens=5)
        assert busy.value.code == "RESOURCE_EXHAUSTED" and busy.value.retry_after_s == HOUR

        # Nobody chooses a tenant: with a bad token there is none, and the header from outside is gone.
        strangers = [(await post(node, None)).status_code for _ in range(3)]
        assert strangers == [200, 200, 429]
        assert peers.calls[-1].request.tenant == "public"


async def test_a_changed_limit_cuts_no_stream(gateway: GatewayUnderTest, peers: Peers, tmp_path: Path) -> None:
    """New limits come with the routes: the listener stays as it is, and what streams goes on."""
    node = node_settings(tmp_path)
    first, second = snapshot(tmp_path, gateway, node, 1), snapshot(tmp_path, gateway, node, 3)
    assert first.listeners == second.listeners
    peers.scripts = [hangs("ab"), says("Hello")]
    async with EnvoyProcess(first, node) as envoy:
        target = f"127.0.0.1:{node.ingress_port}"
        async with autoglm.AsyncClient(target, token=token("c")) as sdk:
            stream = sdk.stream("hi", model=MODEL, max_tokens=20)
            async with stream as events:
                heard = ""
                async for event in events:
                    heard += event.text if isinstance(event, autoglm.Delta) else ""
                    if heard == "ab":
                        break
                assert (await post(node, "c")).status_code == 429
                await envoy.move_to(second)
                statuses = [(await post(node, "c", max_tokens=5)).status_code for _ in range(4)]
                assert statuses == [200, 200, 200, 429]
                assert not peers.calls[0].ended.is_set()


async def test_tokens_are_limited_through_the_door_too(gateway: GatewayUnderTest, peers: Peers, tmp_path: Path) -> None:
    """The gateway's refusal for tokens reaches clients whole, through Envoy, for the tenant of the token only."""
    node = node_settings(tmp_path)
    async with EnvoyProcess(snapshot(tmp_path, gateway, node, None), node):
        url = f"http://127.0.0.1:{node.ingress_port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key=token("d"), max_retries=0, timeout=20) as client:
            for left in (60 - 23, 60 - 8 - 23, 60 - 16 - 23, 60 - 24 - 23):
                raw = await client.completions.with_raw_response.create(**TEXT)
                assert raw.headers["x-ratelimit-remaining-tokens"] == str(left)
            with pytest.raises(openai.RateLimitError) as limited:
                await client.completions.create(**TEXT | {"max_tokens": 40})
            assert limited.value.code == "rate_limit_exceeded"
            assert limited.value.response.headers["x-ratelimit-remaining-tokens"] == str(60 - 32)
        target = f"127.0.0.1:{node.ingress_port}"
        async with autoglm.AsyncClient(target, token=token("d")) as sdk:
            with pytest.raises(autoglm.TooBusyError, match="tokens per minute") as busy:
                await sdk.generate("hi", model=MODEL, max_tokens=40)
        assert busy.value.reason == "TOO_BUSY" and busy.value.retry_after_s is not None
        assert busy.value.retry_after_s > 600 and busy.value.request_id
        assert (await post(node, "e")).status_code == 200
