"""Both clients against a real gRPC server on a socket: events, errors, deadlines, cancellation.

The synchronous client runs in a worker thread, so that it and the server cannot hide each other's blocking.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from autoglm import (
    AccessDeniedError,
    AsyncClient,
    AutoglmError,
    CallCancelledError,
    Client,
    DeadlineError,
    Delta,
    Done,
    Event,
    Finish,
    InternalError,
    InterruptedStreamError,
    InvalidRequestError,
    Message,
    NotFoundError,
    TooBusyError,
    UnavailableError,
    UnsupportedError,
    WrongVariantError,
)
from autoglm.gateway.v1 import gateway_pb2

from services.chassis import errors as chassis
from tests.fakes.fake_gateway import (
    DIGEST,
    REQUEST_ID,
    TRACE_ID,
    Abort,
    FakeGateway,
    Wait,
    delta,
    finish,
    forever,
    usage,
)


@pytest.fixture
async def gateway() -> AsyncIterator[FakeGateway]:
    async with FakeGateway() as running:
        yield running


class Threaded:
    """The synchronous client behind the asyncio client's interface: each call runs in a worker thread."""

    def __init__(self, target: str, **arguments: Any) -> None:
        self._client = Client(target, **arguments)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        async def call(*arguments: Any, **options: Any) -> Any:
            return await asyncio.to_thread(method, *arguments, **options)

        return call

    async def collect(self, prompt: str, **options: Any) -> list[Event]:
        def read() -> list[Event]:
            with self._client.stream(prompt, **options) as stream:
                return list(stream)

        return await asyncio.to_thread(read)


class Awaited(AsyncClient):
    """The asyncio client."""

    async def collect(self, prompt: str, **options: Any) -> list[Event]:
        async with self.stream(prompt, **options) as stream:
            return [event async for event in stream]


@pytest.fixture(params=[Threaded, Awaited], ids=["sync", "async"])
async def client(request: pytest.FixtureRequest, gateway: FakeGateway) -> AsyncIterator[Any]:
    made = request.param(gateway.target, timeout=20)
    yield made
    await made.close()


@pytest.mark.parametrize("make", [Threaded, Awaited], ids=["sync", "async"])
async def test_a_long_road_is_given_the_time_it_takes(make: Any, gateway: FakeGateway) -> None:
    """A connection whose first byte comes late, as from another continent or a busy door, is waited for."""
    host, _, port = gateway.target.rpartition(":")
    late = asyncio.Event()

    async def far(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(host, int(port))

        async def carry(source: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
            while data := await source.read(65536):
                to.write(data)
            to.close()

        asyncio.get_running_loop().call_later(1.0, late.set)
        await late.wait()
        await asyncio.gather(carry(reader, back), carry(there, writer))

    async with await asyncio.start_server(far, "127.0.0.1", 0) as road:
        client = make(f"127.0.0.1:{road.sockets[0].getsockname()[1]}", timeout=20)
        assert (await client.generate("one two three", max_tokens=9)).text
        await client.close()


async def test_a_generation_comes_back_whole(client: Any, gateway: FakeGateway) -> None:
    """Text, counts, ids and digest arrive; the model is found without being named."""
    completion = await client.generate("one two three", max_tokens=9)
    assert (completion.text, completion.finish_reason) == ("one two three", "stop")
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (3, 3)
    assert (completion.request_id, completion.trace_id) == (REQUEST_ID, TRACE_ID)
    assert (completion.variant_digest, completion.model) == (DIGEST, "glm-tiny")
    assert (gateway.requests[0].model, gateway.requests[0].max_tokens) == ("glm-tiny", 9)


async def test_events_come_in_order_and_end_with_done(client: Any, gateway: FakeGateway) -> None:
    """Deltas, a finish per choice, one done."""
    gateway.script(delta("a"), delta("b", 1), finish("length"), finish(choice=1, stop="X"), usage(4, 2, 1))
    events = await client.collect("x", n=2)
    assert events[:-1] == [Delta("a"), Delta("b", 1), Finish("length"), Finish("stop", 1, "X")]
    assert isinstance(events[-1], Done) and events[-1].usage.cached_tokens == 1
    assert (events[-1].request_id, events[-1].trace_id, events[-1].variant_digest) == (REQUEST_ID, TRACE_ID, DIGEST)


async def test_events_are_not_held_back(gateway: FakeGateway) -> None:
    """The first text is in the caller's hands while the server still waits to send the second."""
    gate = asyncio.Event()
    gateway.script(delta("now"), Wait(gate), delta(" then"), finish(), usage())
    async with AsyncClient(gateway.target) as client, client.stream("x") as stream:
        assert await anext(stream) == Delta("now")
        assert stream.request_id == REQUEST_ID and stream.trace_id == TRACE_ID
        gate.set()
        assert (await stream.result()).text == "now then"


async def test_several_choices_and_unicode(client: Any, gateway: FakeGateway) -> None:
    """Choices stay apart; text beyond the basic plane survives both ways."""
    completion = await client.generate("héllo 👩‍🚀 𝄞", n=2)
    assert [choice.text for choice in completion.choices] == ["héllo 👩‍🚀 𝄞"] * 2
    assert gateway.requests[0].text == "héllo 👩‍🚀 𝄞"


async def test_logprobs_arrive_with_bytes_and_alternatives(client: Any, gateway: FakeGateway) -> None:
    """A token that is half a character keeps its bytes; an unasked log-probability is None, not zero."""
    half = gateway_pb2.TokenText(token_id=5, content=b"\xf0\x9f", logprob=-0.5)
    half.top.add(token_id=6, content=b"x", logprob=-1.5)
    gateway.script(
        delta("", tokens=(half,)), delta("a", tokens=(gateway_pb2.TokenText(token_id=7),)), finish(), usage()
    )
    tokens = (await client.generate("x", top_logprobs=1)).choices[0].tokens
    assert [(token.token_id, token.content, token.logprob) for token in tokens] == [
        (5, b"\xf0\x9f", -0.5),
        (7, b"", None),
    ]
    assert (tokens[0].top[0].token_id, tokens[0].top[0].content, tokens[0].top[0].logprob) == (6, b"x", -1.5)
    assert gateway.requests[0].logprobs


async def test_chat_and_token_ids_reach_the_gateway(client: Any, gateway: FakeGateway) -> None:
    """A conversation arrives as one, ids as ids."""
    assert (await client.chat("hi there", system="be kind")).text == "hi there"
    await client.chat([Message("user", "a"), {"role": "assistant", "content": "b"}, Message("user", "c")])
    await client.generate(token_ids=[1, 2, 3])
    first, second, third = gateway.requests
    assert [(turn.role, turn.content) for turn in first.chat.messages] == [("system", "be kind"), ("user", "hi there")]
    assert len(second.chat.messages) == 3
    assert list(third.token_ids.token_ids) == [1, 2, 3]


async def test_counting_models_and_health(client: Any, gateway: FakeGateway) -> None:
    """The three questions a client may ask beside generating."""
    assert (await client.count_tokens("a b c")).tokens == 3
    assert (await client.count_tokens(messages=[Message("user", "a b")], model="m")).tokenizer_digest == DIGEST
    (model,) = await client.models()
    assert (model.name, model.variant_digest, model.context_tokens) == ("glm-tiny", DIGEST, 2048)
    health = await client.health()
    assert health.is_serving and health.latency_s > 0
    assert (await client.health("no.such.Service")).status == "service_unknown"


async def test_health_tells_not_serving(client: Any, gateway: FakeGateway) -> None:
    """The hand-made health messages are the real protocol's."""
    from grpc_health.v1 import health_pb2

    await gateway.health.set("autoglm.gateway.v1.GatewayService", health_pb2.HealthCheckResponse.NOT_SERVING)
    assert (await client.health()).status == "not_serving"


ERRORS = [
    (chassis.InvalidRequest("bad", field="top_k"), InvalidRequestError),
    (chassis.NotFound("no model x"), NotFoundError),
    (chassis.WrongVariant("other digest"), WrongVariantError),
    (chassis.TooBusy("full", retry_after_s=2.5), TooBusyError),
    (chassis.Unavailable("draining"), UnavailableError),
    (chassis.OutOfTime("late"), DeadlineError),
    (chassis.Interrupted("worker died"), InterruptedStreamError),
    (chassis.Internal("internal error"), InternalError),
    (Abort(grpc.StatusCode.PERMISSION_DENIED, "RBAC: access denied"), AccessDeniedError),
    (Abort(grpc.StatusCode.UNAUTHENTICATED, "Jwt is missing"), AccessDeniedError),
    (Abort(grpc.StatusCode.UNIMPLEMENTED, ""), UnsupportedError),
    (Abort(grpc.StatusCode.CANCELLED, "by a proxy"), CallCancelledError),
]


@pytest.mark.parametrize(("failure", "kind"), ERRORS, ids=lambda value: getattr(value, "__name__", None))
async def test_each_failure_has_its_exception(client: Any, gateway: FakeGateway, failure: Any, kind: type) -> None:
    """In a stream and in a plain call, with the public text and the request's name."""
    gateway.script(failure)
    with pytest.raises(AutoglmError) as in_stream:
        await client.generate("x", model="m")
    gateway.failure = failure
    with pytest.raises(AutoglmError) as in_call:
        await client.models()
    assert type(in_stream.value) is type(in_call.value) is kind
    if isinstance(failure, chassis.ServiceError):
        assert in_stream.value.message == failure.message and in_stream.value.request_id == REQUEST_ID
    if isinstance(in_stream.value, TooBusyError):
        assert in_stream.value.retry_after_s == 2.5


@pytest.mark.parametrize("ending", [(), (finish(),), (usage(),)], ids=["nothing", "no usage", "no finish"])
async def test_a_truncated_stream_is_never_an_answer(
    client: Any, gateway: FakeGateway, ending: tuple[Any, ...]
) -> None:
    """A stream that ends OK but incomplete raises, and keeps what had come."""
    gateway.script(delta("half an"), delta(" ans"), *ending)
    with pytest.raises(InterruptedStreamError) as caught:
        await client.generate("x")
    assert caught.value.partial_text == "half an ans"
    assert (caught.value.request_id, caught.value.trace_id) == (REQUEST_ID, TRACE_ID)


@pytest.mark.parametrize(
    "failure",
    [chassis.Interrupted("worker died"), chassis.Unavailable("gone"), Abort(grpc.StatusCode.CANCELLED, "proxy")],
    ids=["interrupted", "unavailable", "cancelled"],
)
async def test_a_failure_midway_keeps_the_partial(client: Any, gateway: FakeGateway, failure: Any) -> None:
    """Broken off after text had come: an interruption, whatever the hop that noticed calls it."""
    gateway.script(delta("half"), failure)
    with pytest.raises(InterruptedStreamError) as caught:
        await client.generate("x")
    assert caught.value.partial_text == "half"


async def test_a_server_that_dies_midway_is_an_interruption_sync(gateway: FakeGateway) -> None:
    """The connection itself breaks after the first text."""
    gateway.script(delta("half"), forever())
    with Client(gateway.target) as client:
        stream = client.stream("x", model="m")
        await asyncio.to_thread(next, stream)
        await gateway.stop()
        with pytest.raises(InterruptedStreamError) as caught:
            await asyncio.to_thread(next, stream)
    assert caught.value.partial_text == "half"


async def test_a_server_that_dies_midway_is_an_interruption_async(gateway: FakeGateway) -> None:
    """The same for the asyncio client."""
    gateway.script(delta("half"), forever())
    async with AsyncClient(gateway.target) as client, client.stream("x") as stream:
        await anext(stream)
        await gateway.stop()
        with pytest.raises(InterruptedStreamError) as caught:
            await anext(stream)
    assert caught.value.partial_text == "half"


async def test_nobody_there_is_unavailable(client: Any, gateway: FakeGateway) -> None:
    """A closed port fails at once and names the target; nothing retries for long."""
    await gateway.stop()
    async with asyncio.timeout(10):
        with pytest.raises(UnavailableError, match=gateway.target):
            await client.generate("x", model="m")


async def test_a_deadline_travels_and_fires(client: Any, gateway: FakeGateway) -> None:
    """The server sees the time left; when it passes, the partial is kept and the server is told."""
    gateway.script(delta("slow"), forever())
    await client.models()  # connected: the time below is for the answer
    with pytest.raises(DeadlineError, match=r"timeout=1\.5 s") as caught:
        await client.generate("x", model="m", timeout=1.5)
    assert caught.value.partial_text == "slow"
    assert gateway.remaining_s[-1] is not None and 0 < gateway.remaining_s[-1] < 1.6  # gRPC rounds up
    await gateway.cancelled.wait()


async def test_metadata_and_token_travel(gateway: FakeGateway) -> None:
    """What the client carries and what one call adds both arrive."""
    async with AsyncClient(gateway.target, token="t", metadata={"x-tenant": "a"}) as client:
        await client.models(metadata={"traceparent": "00-x"})
    seen = gateway.metadata[0]
    assert (seen["authorization"], seen["x-tenant"], seen["traceparent"]) == ("Bearer t", "a", "00-x")
    assert seen["user-agent"].startswith("autoglm-python/")


async def test_sync_leaving_early_cancels_in_the_server(gateway: FakeGateway) -> None:
    """A `with` block left after the first event stops the generation."""
    gateway.script(delta("a"), forever())

    def read_one() -> Event:
        with Client(gateway.target) as client, client.stream("x") as stream:
            for event in stream:
                return event
        raise AssertionError("no event")

    assert await asyncio.to_thread(read_one) == Delta("a")
    await gateway.cancelled.wait()


async def test_sync_cancel_from_another_thread_wakes_the_reader(gateway: FakeGateway) -> None:
    """The reader gets an exception with the partial, not an end that looks proper; so does whoever asks again."""
    gateway.script(delta("a"), forever())
    caught: list[AutoglmError] = []
    with Client(gateway.target) as client:
        stream = client.stream("x", model="m")
        assert await asyncio.to_thread(next, stream) == Delta("a")
        reading = threading.Event()

        def read() -> None:
            for _ in range(2):
                try:
                    reading.set()
                    next(stream)
                except AutoglmError as error:
                    caught.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        await asyncio.to_thread(reading.wait, 5)
        stream.cancel()
        await asyncio.to_thread(reader.join, 10)
        assert [type(error) for error in caught] == [CallCancelledError] * 2
        assert caught[0].partial_text == "a"
        await gateway.cancelled.wait()


async def test_dropping_a_stream_cancels_it(gateway: FakeGateway) -> None:
    """Even without a `with` block, a forgotten stream does not keep a worker busy."""
    gateway.script(delta("a"), forever())
    with Client(gateway.target) as client:
        stream = client.stream("x", model="m")
        await asyncio.to_thread(next, stream)
        del stream
        await gateway.cancelled.wait()


async def test_async_task_cancellation_reaches_the_server(gateway: FakeGateway) -> None:
    """Cancelling the task cancels the call, and the task ends cancelled."""
    gateway.script(delta("a"), forever())
    async with AsyncClient(gateway.target) as client:
        task = asyncio.create_task(client.generate("x"))
        await gateway.started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await gateway.cancelled.wait()


async def test_async_timeouts_of_asyncio_work(gateway: FakeGateway) -> None:
    """`asyncio.timeout` around a call is a TimeoutError and stops the server as well."""
    gateway.script(delta("a"), forever())
    async with AsyncClient(gateway.target) as client:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(None) as limit:
                passing = asyncio.create_task(gateway.started.wait())
                passing.add_done_callback(lambda _: limit.reschedule(0))  # a time that has passed
                await client.generate("x")
        await gateway.cancelled.wait()


async def test_async_leaving_early_cancels_in_the_server(gateway: FakeGateway) -> None:
    """An `async with` block left after the first event stops the generation."""
    gateway.script(delta("a"), forever())
    async with AsyncClient(gateway.target) as client:
        async with client.stream("x") as stream:
            async for _ in stream:
                break
        await gateway.cancelled.wait()


async def test_async_cancel_is_an_error_of_the_call_not_of_the_task(gateway: FakeGateway) -> None:
    """A stream cancelled by someone else raises `CallCancelledError`; the reading task itself lives on."""
    gateway.script(delta("a"), forever())
    async with AsyncClient(gateway.target) as client:
        stream = client.stream("x")
        await anext(stream)
        asyncio.get_running_loop().call_soon(stream.cancel)
        with pytest.raises(CallCancelledError) as caught:
            await anext(stream)
        assert caught.value.partial_text == "a"
        await gateway.cancelled.wait()
        assert (await client.generate("still fine")).text == "still fine"


async def test_a_stream_cancelled_before_it_starts_sends_nothing(gateway: FakeGateway) -> None:
    """No request leaves for an answer nobody wants."""
    async with AsyncClient(gateway.target) as client:
        stream = client.stream("x", model="m")
        stream.cancel()
        with pytest.raises(CallCancelledError):
            await anext(stream)
    assert gateway.requests == []


async def test_a_closed_client_says_so(client: Any, gateway: FakeGateway) -> None:
    """Use after close is a programming error, named."""
    await client.close()
    with pytest.raises(RuntimeError, match="closed"):
        await client.models()


async def test_calls_in_parallel_do_not_mix(client: Any, gateway: FakeGateway) -> None:
    """One client serves many callers at once."""
    answers = await asyncio.gather(*(client.generate(f"word{number} x", model="m") for number in range(16)))
    assert [answer.text for answer in answers] == [f"word{number} x" for number in range(16)]


@pytest.mark.parametrize("kind", [Threaded, Awaited], ids=["sync", "async"])
async def test_the_answer_of_an_endless_server_is_bounded(gateway: FakeGateway, kind: Any) -> None:
    """Memory has a limit; passing it cancels the call."""
    gateway.script(*[delta("x" * 1000)] * 50, forever())
    client = kind(gateway.target, max_answer_bytes=20_000)
    with pytest.raises(InterruptedStreamError, match="max_answer_bytes") as caught:
        await client.generate("x")
    await gateway.cancelled.wait()
    assert 0 < len(caught.value.partial_text) <= 20_000
    await client.close()
