"""What the gateway does when something breaks: a stream ends with a typed finish or error, and nothing is held."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import grpc
import httpx
import openai
import pytest
import pytest_asyncio
from autoglm.gateway.v1 import gateway_pb2 as pb
from autoglm.gateway.v1 import gateway_pb2_grpc

from services.chassis.errors import Unavailable, WrongVariant
from services.gateway.clients import Tokenizer
from services.gateway.models import Model
from tests.fakes.gateway_peers import (
    CONTEXT_TOKENS,
    HANDED_OVER,
    MODEL,
    TOKENIZER,
    VOCABULARY,
    Peers,
    Script,
    breaks,
    chunk,
    ends_silently,
    floods,
    hangs,
    says,
)
from tests.fakes.gateway_process import GatewayUnderTest, gateway_over, listening_peers

pytestmark = pytest.mark.asyncio(loop_scope="module")

TEXT: dict[str, Any] = {"model": MODEL, "prompt": "hi"}
UNAVAILABLE, INTERNAL = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL
OURS = (("autoglm-reason", "INTERNAL"),)
SCRIPTED = "the fake worker fails"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[Peers]:
    async with listening_peers() as peers:
        yield peers


@pytest.fixture(scope="module")
def gateway(server: Peers) -> Iterator[GatewayUnderTest]:
    with gateway_over(
        server.address, AUTOGLM_MAX_IN_FLIGHT="2", AUTOGLM_RETRY_AFTER_S="1.5", AUTOGLM_BODY_TIMEOUT_S="1"
    ) as one:
        yield one


@pytest.fixture
def peers(server: Peers) -> Peers:
    server.reset()
    return server


@pytest_asyncio.fixture(loop_scope="module")
async def rest(gateway: GatewayUnderTest) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=gateway.rest_url, timeout=20) as client:
        yield client


async def ask(gateway: GatewayUnderTest, timeout: float = 20, **fields: Any) -> tuple[str, grpc.aio.AioRpcError | None]:
    """The text that came, and the error that ended the stream, if one did."""
    text = ""
    async with gateway.stub() as stub:
        request = pb.GenerateRequest(**({"model": MODEL, "text": "hi"} | fields))
        try:
            async for message in stub.Generate(request, timeout=timeout):
                text += message.delta.text
        except grpc.aio.AioRpcError as error:
            return text, error
    return text, None


def reason(error: grpc.aio.AioRpcError | None) -> str:
    assert error is not None
    return str(dict(error.trailing_metadata() or ()).get("autoglm-reason"))


def hands_over(text: str) -> Script:
    return says(text, reason=HANDED_OVER)


@pytest.mark.parametrize(
    "script",
    [breaks("Hello", UNAVAILABLE), breaks("Hello", INTERNAL, OURS), ends_silently("Hello"), hands_over("Hello")],
    ids=["unavailable", "internal", "silent end", "handed over"],
)
async def test_a_broken_stream_is_interrupted(gateway: GatewayUnderTest, peers: Peers, script: Script) -> None:
    """After the first token every break is INTERRUPTED, with the count of tokens; what came is a correct prefix."""
    peers.scripts = [script]
    text, error = await ask(gateway)
    assert text == "Hello" and reason(error) == "INTERRUPTED"
    assert error is not None and "5 tokens" in (error.details() or "")
    assert len(peers.calls) == 1


@pytest.mark.parametrize(
    "script",
    [breaks("", UNAVAILABLE), breaks("", grpc.StatusCode.ABORTED), breaks("", INTERNAL), ends_silently("")],
    ids=["unavailable", "aborted", "internal of a proxy", "silent end"],
)
async def test_a_worker_that_fails_at_once_is_asked_again_once(
    gateway: GatewayUnderTest, rest: httpx.AsyncClient, peers: Peers, script: Script
) -> None:
    """One new attempt before the first token, counted as a fallback; a second failure is told."""
    before = await retries(rest)
    peers.scripts = [script, says("fine")]
    assert await ask(gateway) == ("fine", None)
    assert len(peers.calls) == 2 and await retries(rest) == before + 1
    assert peers.calls[0].request == peers.calls[1].request
    peers.scripts = [script]
    text, error = await ask(gateway)
    assert text == "" and error is not None and len(peers.calls) == 4


@pytest.mark.parametrize(
    ("script", "wanted"),
    [
        (breaks("", grpc.StatusCode.RESOURCE_EXHAUSTED), "TOO_BUSY"),
        (breaks("", grpc.StatusCode.INVALID_ARGUMENT), "INVALID_REQUEST"),
        (breaks("", INTERNAL, OURS), "INTERNAL"),
    ],
)
async def test_other_failures_are_not_tried_again(
    gateway: GatewayUnderTest, peers: Peers, script: Script, wanted: str
) -> None:
    """A busy worker, a bad request and a worker's own bug are told at once."""
    peers.scripts = [script]
    _, error = await ask(gateway)
    assert reason(error) == wanted and len(peers.calls) == 1


async def retries(rest: httpx.AsyncClient) -> float:
    page = (await rest.get("/metrics")).text
    lines = [line for line in page.splitlines() if line.startswith('autoglm_fallback_total{kind="generate_retried"}')]
    return float(lines[0].split()[-1]) if lines else 0.0


async def test_a_broken_rest_stream_says_so(rest: httpx.AsyncClient, gateway: GatewayUnderTest, peers: Peers) -> None:
    """The last event is the error and there is no [DONE]; the official client raises."""
    peers.scripts = [breaks("Hello", UNAVAILABLE)]
    answer = await rest.post("/v1/completions", json=TEXT | {"stream": True})
    *_, last, empty = answer.text.split("\n\n")
    assert empty == "" and "[DONE]" not in answer.text
    error = json.loads(last.removeprefix("data: "))["error"]
    assert error["code"] == "interrupted" and error["type"] == "server_error"
    async with openai.AsyncOpenAI(base_url=gateway.rest_url + "/v1", api_key="x", max_retries=0) as client:
        text = ""
        with pytest.raises(openai.APIError):
            async for chunk in await client.completions.create(**TEXT, stream=True):
                text += chunk.choices[0].text
        assert text == "Hello"


async def test_a_broken_stream_is_a_status_when_nothing_was_sent(rest: httpx.AsyncClient, peers: Peers) -> None:
    """Without streaming, an interruption is a 5xx and no partial answer."""
    peers.scripts = [breaks("Hello", UNAVAILABLE)]
    answer = await rest.post("/v1/completions", json=TEXT)
    assert answer.status_code == 502 and answer.json()["error"]["code"] == "interrupted"


async def test_an_answer_outlives_its_tokenizer(gateway: GatewayUnderTest, peers: Peers) -> None:
    """Text is made in the gateway: a tokenizer that breaks under an answer breaks only what comes after it."""
    go = asyncio.Event()

    async def waits(call: Any) -> AsyncIterator[Any]:
        async for message in says("Grüße")(call):
            yield message
            await go.wait()

    peers.scripts = [waits]
    asking = asyncio.create_task(ask(gateway))
    await peers.call()
    peers.is_tokenizer_broken = True
    go.set()
    assert await asking == ("Grüße", None)
    _, error = await ask(gateway)
    assert error is not None and error.details() == "the tokenizer did not answer (UNAVAILABLE)"


async def test_a_token_that_no_tokenizer_knows_ends_the_answer(gateway: GatewayUnderTest, peers: Peers) -> None:
    """An id outside the vocabulary, or in a hole of it, is named in a typed error, and the worker is released."""
    for token_id in (VOCABULARY - 1, VOCABULARY):

        async def strays(call: Any, token_id: int = token_id) -> AsyncIterator[Any]:
            async for message in hangs("Hel")(call):
                yield message
                if message.chunk.first_position == 2:
                    yield chunk([token_id], 3, call.request)

        peers.scripts = [strays]
        text, error = await ask(gateway)
        assert text == "Hel" and reason(error) == "INTERNAL" and error is not None
        assert f"token {token_id}" in (error.details() or "")
        call = await peers.call()
        await asyncio.wait_for(call.ended.wait(), 20)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("said", ["Hello", ""])
async def test_a_rest_client_that_goes_frees_the_worker(
    gateway: GatewayUnderTest, peers: Peers, stream: bool, said: str
) -> None:
    """Closing the connection cancels the worker, before and after the first token."""
    peers.scripts = [hangs(said)]
    async with httpx.AsyncClient(base_url=gateway.rest_url, timeout=20) as client:
        asking = asyncio.create_task(client.post("/v1/completions", json=TEXT | {"stream": stream}))
        call = await peers.call()
        assert not call.ended.is_set()
        asking.cancel()
        await asyncio.wait([asking])
    await asyncio.wait_for(call.ended.wait(), 20)
    assert not call.completed
    await is_idle(gateway, peers)


async def test_a_grpc_client_that_cancels_frees_the_worker(gateway: GatewayUnderTest, peers: Peers) -> None:
    """Cancelling the call cancels every choice."""
    peers.scripts = [hangs("Hello")]
    async with gateway.stub() as stub:
        stream = stub.Generate(pb.GenerateRequest(model=MODEL, text="hi", choices=2))
        await anext(aiter(stream))
        stream.cancel()
        for _ in range(2):
            call = await peers.call()
            await asyncio.wait_for(call.ended.wait(), 20)
    await is_idle(gateway, peers)


async def test_a_client_that_does_not_read_holds_the_worker_back(gateway: GatewayUnderTest, peers: Peers) -> None:
    """A full pipe stops the worker instead of filling the gateway's memory, and the client's end frees it."""
    peers.scripts = [floods(), says("")]
    # On a connection of its own: over one that is full, the requests of others would wait as well.
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.http2.bdp_probe", 0)]
    async with grpc.aio.insecure_channel(gateway.service.address, options=options) as channel:
        stream = gateway_pb2_grpc.GatewayServiceStub(channel).Generate(pb.GenerateRequest(model=MODEL, text="hi"))
        await anext(aiter(stream))
        call, taken = await peers.call(), -1
        async with asyncio.timeout(20):
            while taken != call.sent:  # until nothing is taken from the worker during three requests of others
                taken = call.sent
                assert [await ask(gateway) for _ in range(3)] == [("", None)] * 3
        assert not call.ended.is_set()
        stream.cancel()
        await asyncio.wait_for(call.ended.wait(), 20)
    await is_idle(gateway, peers)


async def test_a_client_that_does_not_read_is_cut_at_its_deadline(gateway: GatewayUnderTest, peers: Peers) -> None:
    """Not reading keeps no worker past the deadline."""
    peers.scripts = [floods()]
    async with gateway.stub() as stub:
        stream = stub.Generate(pb.GenerateRequest(model=MODEL, text="hi"), timeout=3)
        await anext(aiter(stream))
        call = await peers.call()
        await asyncio.wait_for(call.ended.wait(), 20)
        stream.cancel()
    await is_idle(gateway, peers)


async def test_the_deadline_ends_everything(gateway: GatewayUnderTest, peers: Peers) -> None:
    """A worker that hangs is left at the caller's deadline, which it knew."""
    peers.scripts = [hangs("Hello")]
    _, error = await ask(gateway, timeout=3)
    assert error is not None and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    call = await peers.call()
    assert call.remaining_s is not None and call.remaining_s < 3.1  # gRPC rounds up on the wire
    await asyncio.wait_for(call.ended.wait(), 20)
    await is_idle(gateway, peers)


async def test_one_failed_choice_ends_the_others(gateway: GatewayUnderTest, peers: Peers) -> None:
    """A request with several choices fails as one, and no choice is left running."""
    peers.scripts = [hangs("Hello"), breaks("He", UNAVAILABLE)]
    _, error = await ask(gateway, choices=2)
    assert reason(error) == "INTERRUPTED"
    for call in peers.calls:
        await asyncio.wait_for(call.ended.wait(), 20)
    await is_idle(gateway, peers)


async def test_more_than_the_gateway_holds_is_refused(
    gateway: GatewayUnderTest, rest: httpx.AsyncClient, peers: Peers
) -> None:
    """Beyond its bound the gateway says when to come back, and takes work again once there is room."""
    peers.scripts = [hangs("Hello")]
    async with gateway.stub() as stub:
        stream = stub.Generate(pb.GenerateRequest(model=MODEL, text="hi", choices=2))
        await anext(aiter(stream))
        _, error = await ask(gateway)
        assert reason(error) == "TOO_BUSY"
        answer = await rest.post("/v1/completions", json=TEXT)
        assert answer.status_code == 429 and answer.headers["retry-after"] == "2"
        stream.cancel()
    for _ in range(2):
        await asyncio.wait_for((await peers.call()).ended.wait(), 20)
    await is_idle(gateway, peers)


async def is_idle(gateway: GatewayUnderTest, peers: Peers) -> None:
    """The gateway's whole room is free again: a request that takes all of it is served, and nothing is left behind."""
    peers.scripts = [says("ok")]
    async with asyncio.timeout(20):
        while True:
            text, error = await ask(gateway, choices=2)
            if error is None:
                break
            assert reason(error) == "TOO_BUSY"
            await asyncio.sleep(0.02)
        assert sorted(text) == sorted("okok")


async def test_a_body_that_never_ends_is_given_up(gateway: GatewayUnderTest, peers: Peers) -> None:
    """A client that trickles its body is told 408 and cut off, and no worker was asked."""
    host, port = gateway.rest_url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
    writer.write(head.encode())
    assert b" 408 " in await asyncio.wait_for(reader.readline(), 20)
    writer.close()
    assert peers.calls == []


async def test_without_peers_the_gateway_says_so_quickly() -> None:
    """Nobody behind the mesh: alive, not healthy, and a request is refused at once as UNAVAILABLE."""
    with gateway_over("127.0.0.1:1") as gateway:
        async with httpx.AsyncClient(base_url=gateway.rest_url, timeout=20) as rest:
            assert (await rest.get("/live")).status_code == 200
            health = await rest.get("/health")
            assert health.status_code == 503 and set(health.json()["peers"].values()) == {"unreachable"}
            answer = await rest.post("/v1/completions", json=TEXT)
            assert answer.status_code == 503 and answer.json()["error"]["code"] == "unavailable"
            assert (await rest.get("/v1/models")).status_code == 503
        _, error = await ask(gateway)
        assert error is not None and error.code() is UNAVAILABLE
        told = {answer.json()["error"]["message"], error.details()}
        assert told == {"the worker did not answer (UNAVAILABLE)"}
        assert "127.0.0.1:1" in gateway.service.wait_for("a peer failed")["details"]


async def test_words_of_a_proxy_stay_inside(rest: httpx.AsyncClient, peers: Peers) -> None:
    """What Envoy or gRPC say of a lost worker may name addresses: callers never read it, before or after a token."""
    for sent in ("", "Hello"):
        peers.scripts = [breaks(sent, UNAVAILABLE)]
        answer = await rest.post("/v1/completions", json=TEXT)
        assert "the worker did not answer (UNAVAILABLE)" in answer.json()["error"]["message"]
        assert SCRIPTED not in answer.text


async def test_a_vocabulary_is_asked_for_until_it_came_and_then_no_more(peers: Peers) -> None:
    """Half a vocabulary is an error and is not kept; a whole one answers everyone who waited; another's is refused."""
    model = Model(MODEL, "", TOKENIZER, CONTEXT_TOKENS, 0)
    async with grpc.aio.insecure_channel(peers.address) as channel:
        tokenizer = Tokenizer(channel, 5, 1)
        peers.is_tokenizer_broken = True
        with pytest.raises(Unavailable):
            await tokenizer.spelling(model)
        peers.is_tokenizer_broken = False
        first, second = await asyncio.gather(tokenizer.spelling(model), tokenizer.spelling(model))
        assert first is second and peers.vocabularies == 2
        assert (len(first.pieces), first.pieces[65], first.pieces[-1]) == (VOCABULARY, b"A", None)
        assert first.special_ids == {256, 257, 258}
        other = replace(model, tokenizer_digest="sha256:" + "00" * 32)
        with pytest.raises(WrongVariant):
            await tokenizer.spelling(other)
        peers.tokenizer_digest = other.tokenizer_digest
        await tokenizer.spelling(other)  # takes the one place there is
        peers.tokenizer_digest = TOKENIZER
        await tokenizer.spelling(model)
    assert peers.vocabularies == 5


async def test_a_drain_lets_running_streams_finish(peers: Peers) -> None:
    """SIGTERM: streams of both kinds go on to their end, then the process leaves with status 0."""
    go = asyncio.Event()

    async def waits(call: Any) -> AsyncIterator[Any]:
        said = says("done")(call)
        yield await anext(said)
        await go.wait()
        async for message in said:
            yield message

    peers.scripts = [waits]
    with gateway_over(peers.address) as gateway:
        async with httpx.AsyncClient(base_url=gateway.rest_url, timeout=20) as rest:
            over_grpc = asyncio.create_task(ask(gateway))
            over_rest = asyncio.create_task(rest.post("/v1/completions", json=TEXT))
            await peers.call()
            await peers.call()
            gateway.service.signal(signal.SIGTERM)
            await asyncio.to_thread(gateway.service.wait_for, "draining")
            go.set()
            assert await over_grpc == ("done", None)
            assert (await over_rest).json()["choices"][0]["text"] == "done"
        assert await asyncio.to_thread(gateway.service.wait) == 0
