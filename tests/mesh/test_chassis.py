"""A member of the mesh on a real socket: health, reflection, deadlines, errors, drain."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from autoglm.tokenizer.v1 import tokenizer_pb2 as pb
from autoglm.tokenizer.v1 import tokenizer_pb2_grpc as rpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from services.chassis import deadlines, residency
from services.chassis.channels import connect
from services.chassis.errors import from_rpc
from services.chassis.serving import Member
from services.chassis.settings import ServiceSettings

SERVICE = "autoglm.tokenizer.v1.TokenizerService"


class Servicer(rpc.TokenizerServiceServicer):
    """Answers with the time it has left; `via` makes it ask the next server first."""

    def __init__(self) -> None:
        self.next: rpc.TokenizerServiceStub | None = None
        self.waiting, self.release = asyncio.Event(), asyncio.Event()
        self.regions: list[str] = []

    async def Encode(self, request: Any, context: Any) -> pb.EncodeResponse:
        self.regions.append(residency.current())
        if request.text == "bug":
            raise RuntimeError("secret detail")
        if request.text == "wait":
            self.waiting.set()
            await self.release.wait()
        left = deadlines.remaining_s()
        answers = [-1 if left is None else int(left * 1000)]
        if request.text == "hop" and self.next is not None:
            try:
                answers += (await self.next.Encode(pb.EncodeRequest(model="m", text="end"))).token_ids
            except grpc.RpcError as error:
                raise from_rpc(error) from None
        return pb.EncodeResponse(token_ids=[max(0, answer) for answer in answers])


@pytest.fixture
async def member() -> AsyncIterator[tuple[Member, Servicer]]:
    made = Member("tokenizer", ServiceSettings(), [SERVICE])
    servicer = Servicer()
    rpc.add_TokenizerServiceServicer_to_server(servicer, made.server)
    await made.start()
    yield made, servicer
    await made.server.stop(None)


def channel_to(member: Member, **changes: Any) -> grpc.aio.Channel:
    settings = ServiceSettings(mesh_address=f"127.0.0.1:{member.port}", **changes)
    return connect(settings, "tokenizer")


async def test_health_tells_the_truth_and_is_watched(member: tuple[Member, Servicer]) -> None:
    """NOT_SERVING before ready, SERVING after, NOT_SERVING from the drain on; a watcher sees each change."""
    made, _ = member
    async with channel_to(made) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        alive = await stub.Check(health_pb2.HealthCheckRequest())
        assert alive.status == health_pb2.HealthCheckResponse.SERVING, "the process itself is alive"
        await made.ready()
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        await made.not_ready()
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_lists_the_services(member: tuple[Member, Servicer], version: str) -> None:
    """grpcurl and its like find the services and their files, under both names of the reflection service."""
    made, _ = member
    async with channel_to(made) as channel:
        call = channel.stream_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        questions = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE),
        ]
        answers = [answer async for answer in call(iter(questions))]
    names = {service.name for service in answers[0].list_services_response.service}
    assert {SERVICE, "grpc.health.v1.Health"} <= names
    assert answers[1].file_descriptor_response.file_descriptor_proto


async def test_a_deadline_shrinks_by_the_margin_at_each_hop(member: tuple[Member, Servicer]) -> None:
    """The second hop has at least the margin less time than the first; without a deadline there is none."""
    made, servicer = member
    async with channel_to(made, hop_margin_ms=200) as inner, channel_to(made) as outer:
        servicer.next = rpc.TokenizerServiceStub(inner)
        stub = rpc.TokenizerServiceStub(outer)
        first, second = (await stub.Encode(pb.EncodeRequest(model="m", text="hop"), timeout=10)).token_ids
        assert 0 < first <= 10_100
        assert 0 < second <= first - 100, "at least the margin, less what gRPC rounds up"
        assert list((await stub.Encode(pb.EncodeRequest(model="m", text="hop"))).token_ids) == [0, 0]


async def test_the_region_of_a_call_goes_along_to_the_next_service(member: tuple[Member, Servicer]) -> None:
    """Both hops see it; a later call without one has none, and nothing but the name fits."""
    made, servicer = member
    async with channel_to(made) as inner, channel_to(made) as outer:
        servicer.next = rpc.TokenizerServiceStub(inner)
        stub = rpc.TokenizerServiceStub(outer)
        question = pb.EncodeRequest(model="m", text="hop")
        await stub.Encode(question, metadata=(("x-data-region", "azure"),))
        await stub.Encode(question)
        await stub.Encode(question, metadata=(("x-data-region", "x" * 500),))
    assert servicer.regions == ["azure", "azure", "", "", "x" * 64, "x" * 64]


async def test_no_time_left_is_said_before_the_hop(member: tuple[Member, Servicer]) -> None:
    """With less time than the margin, the next service is not bothered: DEADLINE_EXCEEDED, naming the hop."""
    made, servicer = member
    async with channel_to(made, hop_margin_ms=9000) as inner, channel_to(made) as outer:
        servicer.next = rpc.TokenizerServiceStub(inner)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rpc.TokenizerServiceStub(outer).Encode(pb.EncodeRequest(model="m", text="hop"), timeout=5)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_bug_is_internal_and_bland(member: tuple[Member, Servicer]) -> None:
    """What went wrong inside is in the log, not in the answer."""
    made, _ = member
    async with channel_to(made) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rpc.TokenizerServiceStub(channel).Encode(pb.EncodeRequest(model="m", text="bug"))
    assert caught.value.code() is grpc.StatusCode.INTERNAL and "secret" not in (caught.value.details() or "")
    trailers = dict(caught.value.trailing_metadata() or ())
    assert int(str(trailers["x-trace-id"]), 16), "the caller can name the trace to look at"


async def test_a_drain_finishes_running_calls(member: tuple[Member, Servicer]) -> None:
    """After SIGTERM a running call gets its answer, and `run` returns; a second SIGTERM changes nothing."""
    made, servicer = member
    await made.ready()
    serving = asyncio.create_task(made.run())
    async with channel_to(made) as channel:
        call = rpc.TokenizerServiceStub(channel).Encode(pb.EncodeRequest(model="m", text="wait"))
        drained = asyncio.Event()

        async def note() -> None:
            drained.set()

        made.before_drain(note)
        await servicer.waiting.wait()
        while not serving.done() and not drained.is_set():
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.wait({asyncio.create_task(drained.wait()), serving}, timeout=1)
        os.kill(os.getpid(), signal.SIGTERM)
        servicer.release.set()
        assert (await call).token_ids
    await asyncio.wait_for(serving, 20)
