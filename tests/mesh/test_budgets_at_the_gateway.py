"""Token budgets through a real gateway: every way of asking counts once, a refusal tells, others do not notice."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import autoglm
import grpc
import httpx
import openai
import pytest
import pytest_asyncio
from autoglm.gateway.v1 import gateway_pb2 as pb
from google.rpc import error_details_pb2, status_pb2
from prometheus_client.parser import text_string_to_metric_families

from services.gateway.tenancy import TENANT_HEADER
from tests.fakes.gateway_peers import MODEL, Peers, breaks, says
from tests.fakes.gateway_process import GatewayUnderTest, budget_book, gateway_over, listening_peers

pytestmark = pytest.mark.asyncio(loop_scope="module")

NAMES = ("grpc", "grpc-ids", "chat", "chat-stream", "text", "text-stream", "several", "stop", "cached")
BOOK = "version = 1\n" + "".join(
    f"[tenants.{name}]\ntokens_per_minute = 1\nburst_tokens = {burst}\n"
    for name, burst in [*((name, 500) for name in NAMES), ("poor", 30), ("rich", 100_000), ("broken", 500)]
)
"""One token a minute: within a test no bucket fills noticeably, so figures are exact."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[Peers]:
    async with listening_peers() as peers:
        yield peers


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return budget_book(tmp_path_factory, BOOK)


@pytest.fixture(scope="module")
def gateway(server: Peers, book: Path) -> Iterator[GatewayUnderTest]:
    with gateway_over(
        server.address, AUTOGLM_TOKEN_BUDGETS=str(book), AUTOGLM_TOKEN_BUDGETS_WATCH_S="0.05", AUTOGLM_TENANT="rich"
    ) as one:
        yield one


@pytest.fixture
def peers(server: Peers) -> Peers:
    server.reset()
    return server


def client(gateway: GatewayUnderTest, tenant: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url=gateway.rest_url + "/v1",
        api_key="unused",
        max_retries=0,
        timeout=20,
        default_headers={TENANT_HEADER: tenant},
    )


def figure(gateway: GatewayUnderTest, name: str, **labels: str) -> float:
    """A sample of the gateway's metrics page; 0 when it is not there."""
    return sum(
        sample.value
        for family in text_string_to_metric_families(gateway.service.metrics())
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


async def over_grpc(
    gateway: GatewayUnderTest, tenant: str, **fields: Any
) -> tuple[dict[str, Any], grpc.aio.AioRpcError | None]:
    """The trailing metadata, and the error if there was one."""
    async with gateway.stub() as stub:
        request = pb.GenerateRequest(**({"model": MODEL, "text": "hi", "max_tokens": 20} | fields))
        call = stub.Generate(request, timeout=20, metadata=((TENANT_HEADER, tenant),))
        try:
            async for _ in call:
                pass
        except grpc.aio.AioRpcError as error:
            return dict(error.trailing_metadata() or ()), error  # type: ignore[arg-type]  # pairs at run time
        return dict(await call.trailing_metadata() or ()), None  # type: ignore[arg-type]  # pairs at run time


async def ask(gateway: GatewayUnderTest, how: str) -> int:
    """One request of each kind; returns what it must have cost."""
    async with client(gateway, how) as one:
        match how:
            case "grpc":
                await over_grpc(gateway, how)
                return 3 + 5
            case "grpc-ids":
                await over_grpc(gateway, how, text=None, token_ids=pb.TokenIds(token_ids=[1, 2]), choices=3)
                return 2 + 3 * 5
            case "chat" | "chat-stream":
                said: Any = await one.chat.completions.create(
                    model=MODEL, messages=[{"role": "user", "content": "hi"}], max_tokens=20, stream=how != "chat"
                )
                if how != "chat":
                    assert [chunk async for chunk in said]
                return 9 + 5
            case "several":
                await one.completions.create(model=MODEL, prompt=["hi", "there"], n=2, max_tokens=20)
                return 3 + 6 + 4 * 5
            case "stop":
                await one.completions.create(model=MODEL, prompt="hi", max_tokens=20, stop="l")
                return 3 + 3
            case _:
                text: Any = await one.completions.create(
                    model=MODEL, prompt="hi", max_tokens=20, stream=how == "text-stream"
                )
                if how == "text-stream":
                    assert [chunk async for chunk in text]
                return 3 + 5


@pytest.mark.parametrize("how", NAMES)
async def test_every_way_of_asking_counts_once(gateway: GatewayUnderTest, peers: Peers, how: str) -> None:
    """Prompt once, each choice's tokens, cached or not, streamed or not: what is told as usage is what is settled."""
    peers.scripts = [says("Hello", cached=2 if how == "cached" else 0)]
    cost = await ask(gateway, how)
    assert figure(gateway, "autoglm_budget_settled_tokens_total", tenant=how) == cost
    assert figure(gateway, "autoglm_budget_held_tokens", tenant=how) == 0
    trailers, error = await over_grpc(gateway, how)
    assert error is None
    assert trailers["x-ratelimit-remaining-tokens"] == str(500 - cost - 23)
    assert trailers["x-ratelimit-limit-tokens"] == "1"


async def test_a_failure_of_the_mesh_before_the_first_token_costs_nothing(
    gateway: GatewayUnderTest, peers: Peers
) -> None:
    """A worker that refuses leaves the budget as it was; one that breaks later has been used until then."""
    peers.scripts = [breaks("", grpc.StatusCode.INVALID_ARGUMENT), breaks("abc", grpc.StatusCode.UNAVAILABLE)]
    for expected in (0, 3 + 3):
        _, error = await over_grpc(gateway, "broken")
        assert error is not None
        assert figure(gateway, "autoglm_budget_settled_tokens_total", tenant="broken") == expected
        assert figure(gateway, "autoglm_budget_held_tokens", tenant="broken") == 0


async def test_who_has_used_up_is_told_and_others_do_not_notice(gateway: GatewayUnderTest, peers: Peers) -> None:
    """gRPC, REST and the SDK name the budget and the time to wait; nothing was tokenised; other tenants are served."""
    trailers, error = await over_grpc(gateway, "poor", max_tokens=25)
    assert error is None and trailers["x-ratelimit-remaining-tokens"] == "2"
    peers.reset()
    trailers, error = await over_grpc(gateway, "poor", max_tokens=25)
    assert error is not None and error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert peers.encoded == 0 and not peers.calls
    assert "1 tokens per minute" in str(error.details()) and int(trailers["retry-after-ms"]) > 60_000
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    info = error_details_pb2.ErrorInfo()
    status.details[0].Unpack(info)
    assert info.reason == "TOO_BUSY" and info.metadata["kind"] == "rate_limit_exceeded"
    assert info.metadata["tenant"] == "poor" and info.metadata["limit"] == "1"
    assert trailers["x-ratelimit-limit-tokens"] == "1"

    async with client(gateway, "poor") as one:
        with pytest.raises(openai.RateLimitError) as limited:
            await one.completions.create(model=MODEL, prompt="hi", max_tokens=25)
    assert limited.value.code == "rate_limit_exceeded"
    headers = limited.value.response.headers
    assert int(headers["retry-after"]) > 60 and headers["x-ratelimit-limit-tokens"] == "1"
    assert headers["x-ratelimit-reset-tokens"].endswith("s") and int(headers["x-ratelimit-remaining-tokens"]) < 25

    async with autoglm.AsyncClient(gateway.service.address, metadata={TENANT_HEADER: "poor"}) as sdk:
        with pytest.raises(autoglm.TooBusyError) as busy:
            await sdk.generate("hi", model=MODEL, max_tokens=25)
    assert busy.value.retry_after_s is not None and busy.value.retry_after_s > 60
    assert figure(gateway, "autoglm_budget_refusals_total", tenant="poor", reason="empty") >= 3
    assert figure(gateway, "autoglm_budget_held_tokens", tenant="poor") == 0

    async with client(gateway, "rich") as other:
        raw = await other.completions.with_raw_response.create(model=MODEL, prompt="hi", max_tokens=25)
        assert int(raw.headers["x-ratelimit-remaining-tokens"]) > 90_000


async def test_too_much_for_any_day_is_a_bad_request(gateway: GatewayUnderTest, peers: Peers) -> None:
    """A request larger than its tenant's bucket is refused as such, with the bound."""
    async with client(gateway, "poor") as one:
        with pytest.raises(openai.BadRequestError) as refused:
            await one.completions.create(model=MODEL, prompt="hi", max_tokens=40)
    assert refused.value.code == "request_over_budget" and "30" in refused.value.message


async def test_the_tenant_is_the_headers_and_reaches_the_worker(gateway: GatewayUnderTest, peers: Peers) -> None:
    """The named tenant fences the cache too; no name is the gateway's own tenant; two names are refused."""
    await over_grpc(gateway, "rich-friend")
    async with httpx.AsyncClient(base_url=gateway.rest_url, timeout=20) as rest:
        assert (await rest.post("/v1/completions", json={"model": MODEL, "prompt": "hi"})).status_code == 200
        twice = await rest.post(
            "/v1/completions",
            json={"model": MODEL, "prompt": "hi"},
            headers=[(TENANT_HEADER, "rich"), (TENANT_HEADER, "poor")],
        )
    assert [call.request.tenant for call in peers.calls] == ["rich-friend", "rich"]
    assert twice.status_code == 400 and twice.json()["error"]["param"] == TENANT_HEADER


async def test_an_edited_file_counts_from_the_next_request(gateway: GatewayUnderTest, peers: Peers, book: Path) -> None:
    """No restart: a tenant gets a budget, and a broken edit changes nothing."""
    seen = len(gateway.service.lines)
    replace(book, BOOK + "[tenants.newcomer]\ntokens_per_minute = 5\n")
    gateway.service.wait_for("budgets read", after=seen)
    _, error = await over_grpc(gateway, "newcomer", max_tokens=5)
    assert error is not None and error.code() is grpc.StatusCode.INVALID_ARGUMENT
    seen = len(gateway.service.lines)
    replace(book, "version = 1\n[tenants")
    gateway.service.wait_for("budgets_kept", after=seen)
    _, error = await over_grpc(gateway, "newcomer", max_tokens=5)
    assert error is not None and error.code() is grpc.StatusCode.INVALID_ARGUMENT


def replace(path: Path, content: str) -> None:
    draft = path.with_suffix(".draft")
    draft.write_text(content)
    os.replace(draft, path)


async def test_a_wrong_file_stops_the_start(tmp_path: Path) -> None:
    """The gateway says what is wrong with the file and does not start."""
    path = tmp_path / "budgets.toml"
    path.write_text("version = 1\n[default]\ntokens_per_hour = 1\n")
    with (
        pytest.raises(AssertionError, match="tokens_per_hour"),
        gateway_over("127.0.0.1:1", AUTOGLM_TOKEN_BUDGETS=str(path)),
    ):
        pass


async def test_a_store_that_cannot_be_one_stops_the_start() -> None:
    """One line that names the setting, without what may be a password; no traceback, and it does not start."""
    with (
        pytest.raises(AssertionError, match="AUTOGLM_BUDGET_STORE_URL: the host or the port") as told,
        gateway_over("127.0.0.1:1", AUTOGLM_BUDGET_STORE_URL="redis://someone:hunter2@store:port/1"),
    ):
        pass
    assert "Traceback" not in str(told.value) and "hunter2" not in str(told.value)
