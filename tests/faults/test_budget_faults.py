"""What becomes of reserved tokens when something breaks: settled whoever ends a stream, and never more granted."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import pytest_asyncio
from autoglm.gateway.v1 import gateway_pb2 as pb
from prometheus_client.parser import text_string_to_metric_families

from services.chassis.telemetry import FALLBACKS
from services.gateway.budgets.bucket import Budget
from services.gateway.budgets.ledger import Local
from services.gateway.budgets.redis_ledger import PREFIX, Shared
from services.gateway.tenancy import TENANT_HEADER
from tests.fakes import redis_server
from tests.fakes.gateway_peers import MODEL, Peers, breaks, ends_silently, hangs, says
from tests.fakes.gateway_process import GatewayUnderTest, budget_book, gateway_over, listening_peers
from tests.fakes.redis_server import RealRedis

pytestmark = pytest.mark.asyncio(loop_scope="module")

NAMES = ("gone", "gone-rest", "dead", "silent", "late", "prefilling")
BOOK = "version = 1\n[default]\ntokens_per_minute = 1\nburst_tokens = 1000\n" + "".join(
    f"[tenants.{name}]\ntokens_per_minute = 1\nburst_tokens = 1000\n" for name in (*NAMES, "shared")
)
TEXT: dict[str, Any] = {"model": MODEL, "prompt": "hi", "max_tokens": 20}
SLOW = Budget(1, 100)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[Peers]:
    async with listening_peers() as peers:
        yield peers


@pytest.fixture
def peers(server: Peers) -> Peers:
    server.reset()
    return server


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealRedis]:
    if redis_server.real_binary() is None:
        pytest.skip("no valkey-server or redis-server is installed (make packages)")
    with RealRedis(str(tmp_path_factory.mktemp("redis"))) as one:
        yield one


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return budget_book(tmp_path_factory, BOOK)


@pytest.fixture(scope="module")
def gateway(server: Peers, book: Path) -> Iterator[GatewayUnderTest]:
    with gateway_over(server.address, AUTOGLM_TOKEN_BUDGETS=str(book)) as one:
        yield one


def figure(gateway: GatewayUnderTest, name: str, **labels: str) -> float:
    return sum(
        sample.value
        for family in text_string_to_metric_families(gateway.service.metrics())
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


async def settled(gateway: GatewayUnderTest, tenant: str) -> float:
    """What the tenant has used, once nothing of it is reserved any more."""
    async with asyncio.timeout(20):
        while await asyncio.to_thread(figure, gateway, "autoglm_budget_held_tokens", tenant=tenant):
            await asyncio.to_thread(time.sleep, 0.02)
    return figure(gateway, "autoglm_budget_settled_tokens_total", tenant=tenant)


async def ask(gateway: GatewayUnderTest, tenant: str, timeout: float = 20) -> tuple[str, Any]:
    """The text that came, and the status with the tokens that were left at admission."""
    text = ""
    async with gateway.stub() as stub:
        request = pb.GenerateRequest(model=MODEL, text="hi", max_tokens=20)
        call = stub.Generate(request, timeout=timeout, metadata=((TENANT_HEADER, tenant),))
        try:
            async for message in call:
                text += message.delta.text
        except grpc.aio.AioRpcError as error:
            return text, (error.code(), dict(error.trailing_metadata() or ()))  # type: ignore[arg-type]  # pairs at run time
        return text, (await call.code(), dict(await call.trailing_metadata() or ()))  # type: ignore[arg-type]  # pairs at run time


async def test_a_client_that_vanishes_pays_for_what_it_got(gateway: GatewayUnderTest, peers: Peers) -> None:
    """gRPC cancelled mid-stream: prompt and tokens so far are settled, the rest goes back."""
    peers.scripts = [hangs("abcd")]
    async with gateway.stub() as stub:
        request = pb.GenerateRequest(model=MODEL, text="hi", max_tokens=20)
        call = stub.Generate(request, timeout=20, metadata=((TENANT_HEADER, "gone"),))
        text = ""
        while text != "abcd":
            text += (await call.read()).delta.text
        assert figure(gateway, "autoglm_budget_held_tokens", tenant="gone") == 23
        call.cancel()
    assert await settled(gateway, "gone") == 3 + 4


async def test_a_closed_connection_pays_too(gateway: GatewayUnderTest, peers: Peers) -> None:
    """REST: the client closes its connection in the middle of an event stream."""
    peers.scripts = [hangs("abcd")]
    async with (
        httpx.AsyncClient(base_url=gateway.rest_url, timeout=20) as rest,
        rest.stream(
            "POST", "/v1/completions", json=TEXT | {"stream": True}, headers={TENANT_HEADER: "gone-rest"}
        ) as answer,
    ):
        assert answer.headers["x-ratelimit-remaining-tokens"] == "977"
        seen = ""
        async for line in answer.aiter_lines():
            seen += line
            if '"d"' in seen:
                break
    assert await settled(gateway, "gone-rest") == 3 + 4


async def test_leaving_during_the_prefill_is_not_free(gateway: GatewayUnderTest, peers: Peers) -> None:
    """A caller who leaves before the first token pays the prompt that a worker was asked for."""
    peers.scripts = [hangs()]
    async with gateway.stub() as stub:
        request = pb.GenerateRequest(model=MODEL, text="hi", max_tokens=20)
        call = stub.Generate(request, timeout=20, metadata=((TENANT_HEADER, "prefilling"),))
        await peers.call()
        call.cancel()
    assert await settled(gateway, "prefilling") == 3


@pytest.mark.parametrize(
    ("tenant", "script"),
    [("dead", breaks("abc", grpc.StatusCode.UNAVAILABLE)), ("silent", ends_silently("abc")), ("late", hangs("abc"))],
)
async def test_a_worker_that_dies_or_a_deadline_settles(
    gateway: GatewayUnderTest, peers: Peers, tenant: str, script: Any
) -> None:
    """However a begun stream ends, what came is used and the rest goes back."""
    peers.scripts = [script]
    text, (code, _) = await ask(gateway, tenant, timeout=3 if tenant == "late" else 20)
    assert text == "abc" and code is not grpc.StatusCode.OK
    assert await settled(gateway, tenant) == 3 + 3


async def test_two_gateways_share_one_budget(server: Peers, peers: Peers, redis: RealRedis, book: Path) -> None:
    """What one takes the other sees; killed with a stream under way, its reservation stays a charge, and no more."""
    peers.scripts = [says("Hello")]
    chosen = {"AUTOGLM_TOKEN_BUDGETS": str(book), "AUTOGLM_BUDGET_STORE_URL": redis.url}
    chosen["AUTOGLM_BUDGET_STORE_TIMEOUT_MS"] = "5000"  # this test is not about a slow store
    with gateway_over(server.address, **chosen) as one, gateway_over(server.address, **chosen) as two:
        assert "redis://" not in one.service.log()
        left = []
        for gateway in (one, two, one, two):
            _, (code, trailers) = await ask(gateway, "shared")
            assert code is grpc.StatusCode.OK
            await settled(gateway, "shared")
            left.append(int(trailers["x-ratelimit-remaining-tokens"]))
        # Each was told what was left with 23 reserved; the one before had used 8. A return may still be on its way.
        assert left[0] == 977 and left[3] <= 977 - 3 * 8
        assert all(later in (earlier - 8, earlier - 23) for earlier, later in pairwise(left))

        peers.reset()
        peers.scripts = [hangs("abc")]
        dying = asyncio.create_task(ask(one, "shared"))
        await peers.call()
        one.service.kill()
        await dying
        peers.scripts = [says("Hello")]
        _, (_, trailers) = await ask(two, "shared")
        assert int(trailers["x-ratelimit-remaining-tokens"]) == 1000 - 4 * 8 - 23 - 23


@pytest_asyncio.fixture(loop_scope="module")
async def pair(redis: RealRedis) -> AsyncIterator[tuple[Shared, Shared]]:
    """Two gateways' views of one store."""
    both = Shared(redis.url, 20.0, 8, Local(100), 1.0), Shared(redis.url, 20.0, 8, Local(100), 1.0)
    yield both
    for one in both:
        await one.close()


async def test_many_at_once_get_no_more_than_there_is(pair: tuple[Shared, Shared]) -> None:
    """600 reservations at once from two gateways: together burst + rate × time at most, and nearly all of the burst."""
    budget = Budget(600, 1000)
    began = time.monotonic()
    asked = [pair[n % 2].take("crowd", budget, 7) for n in range(600)]
    granted = 7 * sum(answer.is_granted for answer in await asyncio.gather(*asked))
    assert 1000 - 7 < granted <= 1000 + budget.per_second * (time.monotonic() - began)


async def test_an_unsettled_reservation_heals_with_time(pair: tuple[Shared, Shared], redis: RealRedis) -> None:
    """Nobody returns what a dead process had taken: the bucket fills by itself, and is then forgotten by the store."""
    budget = Budget(600_000, 1000)
    assert (await pair[0].take("heals", budget, 1000)).is_granted
    async with asyncio.timeout(20):
        while not (await pair[1].take("heals", budget, 1000)).is_granted:
            pass  # each look asks the server, so this is no busy loop
    assert 0 < await pair[0]._client.pttl(PREFIX + "heals") <= 2000


async def test_the_script_says_what_the_bucket_says(pair: tuple[Shared, Shared]) -> None:
    """Take, look and put back give the same answers in Lua and in Python, to the token."""
    local = Local(10)
    for tokens, look in [(40, False), (61, True), (60, True), (61, False), (59, False), (1, True), (2, False)]:
        ours = await (local.look if look else local.take)("same", SLOW, tokens)
        theirs = await (pair[0].look if look else pair[0].take)("same", SLOW, tokens)
        assert (theirs.is_granted, round(theirs.left)) == (ours.is_granted, round(ours.left)), (tokens, look)
    for back in (30, 69):
        await local.put_back("same", SLOW, back)
        await pair[0].put_back("same", SLOW, back)
        assert round((await pair[1].take("same", SLOW, 0)).left) == round(local.left("same", SLOW))


@pytest.mark.parametrize("seed", range(5))
async def test_lost_and_late_calls_are_put_right(pair: tuple[Shared, Shared], seed: int) -> None:
    """Calls that never arrive, answers that get lost, old calls carried out late: in the end the store is right."""
    dice, name, budget = random.Random(seed), f"lossy-{seed}", Budget(1, 1_000_000)
    for shared in pair:
        script, earlier = shared._script, []

        async def lossy(*, keys: list[str], args: list[Any], script: Any = script, earlier: list[Any] = earlier) -> Any:
            fate = dice.random()
            if fate < 0.2:
                raise ConnectionError("never arrived")
            if earlier and fate < 0.4:
                await script(keys=keys, args=dice.choice(earlier))
            earlier.append(args)
            answer = await script(keys=keys, args=args)
            if fate > 0.8:
                raise ConnectionError("the answer was lost")
            return answer

        shared._script = lossy
        await _played(shared, name, budget, random.Random(seed))
        shared._script = script
    drawn = 0
    for shared in pair:
        shared._breaker.succeeded()
        assert (await shared.take(name, budget, 0)).is_shared
        drawn += shared._accounts[name].drawn
    assert drawn > 0
    assert round((await pair[0].take(name, budget, 0)).left) == 1_000_000 - drawn


async def _played(shared: Shared, name: str, budget: Budget, dice: random.Random) -> None:
    """Many reservations, some at once, and most of them returned in part. What was granted is what the account says."""
    granted = 0

    async def one(tokens: int, back: int) -> int:
        if not (await shared.take(name, budget, tokens)).is_granted:
            return 0
        await shared.put_back(name, budget, back)
        return tokens - back

    for _ in range(20):
        asked = [(tokens, dice.randint(0, tokens)) for tokens in (dice.randint(1, 500) for _ in range(5))]
        granted += sum(await asyncio.gather(*(one(*some) for some in asked)))
        shared._breaker.succeeded()
    assert shared._accounts[name].drawn == granted


async def test_a_store_that_dies_or_hangs_is_told_and_bounded(redis: RealRedis) -> None:
    """Without the store a gateway goes on from where it saw the bucket; back and empty, it gives nothing twice."""
    shared = Shared(redis.url, 1.0, 4, Local(100), 1.0)
    told, off = (FALLBACKS.labels(kind=kind)._value for kind in ("budget_store", "budget_store_off"))
    first = await shared.take("stranded", SLOW, 70)
    assert first.is_granted and first.is_shared
    before = told.get(), off.get()
    redis.hang()
    try:
        answer = await shared.take("stranded", SLOW, 20)
        assert (answer.is_granted, answer.is_shared) == (True, False) and told.get() == before[0] + 1
        await shared.put_back("stranded", SLOW, 60)
        assert (await shared.take("stranded", SLOW, 71)).is_granted is False
        assert off.get() == before[1]
        assert not (await shared.take("stranded", SLOW, 71)).is_granted
        assert off.get() == before[1] + 1 and told.get() == before[0] + 3
    finally:
        redis.wake()
    shared._breaker.succeeded()
    back = await shared.take("stranded", SLOW, 0)
    assert back.is_shared and round(back.left) == 100 - 70 - 20 + 60
    redis.kill()
    assert (await shared.take("stranded", SLOW, 30)).is_granted
    redis.start()
    shared._breaker.succeeded()
    back = await shared.take("stranded", SLOW, 0)
    assert back.is_shared and round(back.left) == 40
    await shared.close()


async def test_a_gateway_serves_on_without_its_store(server: Peers, peers: Peers, redis: RealRedis, book: Path) -> None:
    """The store is not there: requests are served, budgets still hold within this gateway, and the fallback is told."""
    peers.scripts = [says("Hello")]
    with gateway_over(
        server.address, AUTOGLM_TOKEN_BUDGETS=str(book), AUTOGLM_BUDGET_STORE_URL="redis://127.0.0.1:1/0"
    ) as lonely:
        _, (code, trailers) = await ask(lonely, "dead")
        assert code is grpc.StatusCode.OK and trailers["x-ratelimit-remaining-tokens"] == "977"
        lonely.service.wait_for("budget_store")
        assert figure(lonely, "autoglm_fallback_total", kind="budget_store") >= 1
        assert await settled(lonely, "dead") == 8
