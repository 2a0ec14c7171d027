"""The translated policy on a real Envoy: accepted, changed without a lost request, refused without harm."""

import asyncio
import json
import os
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import grpc
import httpx
import pytest

from services.mesh.policy import Policy, PolicyError, load
from services.mesh.policy.destination_rule import DestinationRule
from services.mesh.policy.virtual_service import VirtualService
from services.mesh.registry import Endpoint, Registry, Service, ServicePort
from services.mesh.translate import NodeSettings, translate
from tests.fakes.echo_upstream import ECHO, SAY, STREAM, EchoUpstream, channel
from tests.fakes.envoy_process import EnvoyProcess, free_port, node_settings, put, validate
from tests.fakes.picker_process import PickerProcess

Item = TypeVar("Item", VirtualService, DestinationRule)

BASE = Path(__file__).resolve().parents[2] / "istio" / "base"
WORKERS = "sparse-inference.autoglm.svc.cluster.local"
GRPC = ServicePort("grpc", 50051, "grpc")
REST = ServicePort("http", 8000, "http")


def endpoint(port: int, version: str = "v1") -> Endpoint:
    return Endpoint("127.0.0.1", port, {"version": version})


def registry(**endpoints: tuple[Endpoint, ...]) -> Registry:
    """The services of `istio/base`, with endpoints by service name (`sparse_inference` for sparse-inference)."""
    services = []
    for name in ("gateway", "tokenizer", "scheduler", "cache", "sparse-inference"):
        ports = (GRPC, REST) if name == "gateway" else (GRPC,)
        here = {"grpc": endpoints.get(name.replace("-", "_"), ())}
        services.append(Service(name, "autoglm", ports, here, {"app": name}))
    return Registry(tuple(services))


def base_policy() -> Policy:
    """`istio/base` as it stands."""
    return load(BASE)


def weighted(v1: int, canary: int, *, is_picked: bool = False) -> Policy:
    """`istio/base` with other weights; without the picker unless a test needs one."""
    policy = base_policy()
    changed = []
    for service in policy.virtual_services:
        data = service.model_dump(mode="json", by_alias=True, exclude_unset=True)
        if service.metadata.name == "sparse-inference":
            first, second = data["spec"]["http"][-1]["route"]
            first["weight"], second["weight"] = v1, canary
        changed.append(type(service).model_validate_json(json.dumps(data)))
    pools = policy.inference_pools if is_picked else ()
    return replace(policy, virtual_services=tuple(changed), inference_pools=pools)


@pytest.mark.parametrize("dialect", ["resilient", "istio"])
async def test_envoy_accepts_the_base_policy(tmp_path: Path, dialect: str) -> None:
    """What istio/base translates to is valid for the Envoy that is shipped, with tracing and with both dialects."""
    node = replace(node_settings(tmp_path), otlp_endpoint="127.0.0.1:4317", locality="aws/a")
    node = replace(node, picker_dialect=dialect)  # type: ignore[arg-type]  # one of the two literals
    snapshot = translate(base_policy(), registry(sparse_inference=(endpoint(1),)), node)
    status, log = await validate(snapshot.static(), tmp_path)
    assert status == 0, log


async def test_envoy_accepts_every_supported_field(tmp_path: Path) -> None:
    """A policy that uses each translated field is valid for the real Envoy."""
    policy = load(Path(__file__).parents[1] / "unit" / "mesh_policy" / "everything")
    endpoints = tuple(Endpoint("127.0.0.1", 1000 + i, {"version": "v1"}, f"aws/{i}") for i in range(3))
    snapshot = translate(
        policy, registry(sparse_inference=endpoints), replace(node_settings(tmp_path), locality="aws/1")
    )
    status, log = await validate(snapshot.static(), tmp_path)
    assert status == 0, log


async def test_an_edited_weight_moves_traffic_without_a_failed_request(tmp_path: Path) -> None:
    """100/0 → 50/50 → 0/100 under load: no unary call fails, and a running stream stays with its worker."""
    async with EchoUpstream("v1") as old, EchoUpstream("canary") as new:
        workers = registry(sparse_inference=(endpoint(old.port), endpoint(new.port, "canary")))
        node = node_settings(tmp_path)
        first = translate(weighted(100, 0), workers, node)
        async with EnvoyProcess(first, node) as envoy, channel(node.outbound_port, WORKERS) as calls:
            stream = calls.unary_stream(STREAM)(b"")
            assert await stream.read() == b"v1"
            answers: Counter[bytes] = Counter()
            rounds = [0] * 4
            stop = asyncio.Event()
            turns = asyncio.Condition()

            async def load_on(caller: int) -> None:
                while not stop.is_set():
                    answers[await calls.unary_unary(SAY)(b"x", timeout=10)] += 1
                    rounds[caller] += 1
                    async with turns:
                        turns.notify_all()

            async def moved_on() -> None:
                """Nobody waits any more for an answer that was asked for before."""
                before = tuple(rounds)
                async with turns:
                    await turns.wait_for(lambda: all(now > then + 1 for then, now in zip(before, rounds, strict=True)))

            async def answered(more: int) -> Counter[bytes]:
                before = Counter(answers)
                async with turns:
                    await turns.wait_for(lambda: sum(answers.values()) - sum(before.values()) >= more)
                return Counter(answers) - before

            async with asyncio.TaskGroup() as group:
                for caller in range(4):
                    group.create_task(load_on(caller))
                assert set(await answered(50)) == {b"v1"}
                await envoy.move_to(translate(weighted(50, 50), workers, node))
                await moved_on()
                assert set(await answered(100)) == {b"v1", b"canary"}
                await envoy.move_to(translate(weighted(0, 100), workers, node))
                await moved_on()
                assert set(await answered(50)) == {b"canary"}
                old.release()
                assert await stream.read() == b"v1"
                old.release(is_last=True)
                assert await stream.read() is grpc.aio.EOF
                stop.set()
            assert await stream.code() is grpc.StatusCode.OK


async def test_a_route_to_nowhere_is_refused_and_the_old_one_stays(tmp_path: Path) -> None:
    """Were a broken route file ever written, Envoy would count a refusal and go on serving."""
    async with EchoUpstream("v1") as worker:
        node = node_settings(tmp_path)
        snapshot = translate(weighted(100, 0), registry(sparse_inference=(endpoint(worker.port),)), node)
        async with EnvoyProcess(snapshot, node) as envoy, channel(node.outbound_port, WORKERS) as calls:
            broken = snapshot.files()["rds/outbound.json"].replace(b"|v1|", b"|nowhere|")
            put(tmp_path, {"rds/outbound.json": broken})
            await envoy.until(lambda stats: stats["http.outbound.rds.outbound.update_rejected"] != "0")
            put(tmp_path, {"rds/outbound.json": b"{"})
            await envoy.until(lambda stats: stats["http.outbound.rds.outbound.update_failure"] != "0")
            assert await calls.unary_unary(SAY)(b"x", timeout=10) == b"v1"


async def test_a_policy_with_errors_never_reaches_envoy(tmp_path: Path) -> None:
    """translate refuses weights that do not add up, and names the place."""
    with pytest.raises(PolicyError) as caught:
        translate(weighted(90, 5), registry(), node_settings(tmp_path))
    assert [problem.path for problem in caught.value.problems] == ["spec.http[1].route"]


async def test_a_new_subset_arrives_before_its_route_and_leaves_after_it(tmp_path: Path) -> None:
    """Adding and removing a subset together with its route fails no request: each step is taken by Envoy in turn."""
    async with EchoUpstream("v1") as worker, EchoUpstream("next") as other:
        workers = registry(sparse_inference=(endpoint(worker.port), endpoint(other.port, "next")))
        node = node_settings(tmp_path)
        before = weighted(100, 0)
        after = replace(
            before,
            virtual_services=tuple(_renamed(item) for item in weighted(0, 100).virtual_services),
            destination_rules=tuple(_renamed(item) for item in before.destination_rules),
        )
        first, second = translate(before, workers, node), translate(after, workers, node)
        async with EnvoyProcess(first, node) as envoy, channel(node.outbound_port, WORKERS) as calls:
            assert await calls.unary_unary(SAY)(b"x", timeout=10) == b"v1"
            await envoy.move_to(second)
            assert await calls.unary_unary(SAY)(b"x", timeout=10) == b"next"
            await envoy.move_to(first)
            assert await calls.unary_unary(SAY)(b"x", timeout=10) == b"v1"
            stats = await envoy.stats()
            assert stats["http.outbound.rds.outbound.update_rejected"] == "0"
            assert not any("|next|" in name and "membership_total" in name for name in stats)


def _renamed(item: Item) -> Item:
    """The same object with the subset `canary` (and its label) called `next`."""
    text = json.dumps(item.model_dump(mode="json", by_alias=True, exclude_unset=True))
    return type(item).model_validate_json(text.replace('"canary"', '"next"'))


async def test_the_outside_reaches_the_gateway_only_and_cannot_forge_our_headers(tmp_path: Path) -> None:
    """Ingress: the public services are routed, all else is 404, and headers that steer the mesh are removed."""
    forged = (
        ("x-autoglm-tenant", "root"),
        ("x-gateway-destination-endpoint", "127.0.0.1:1"),
        ("x-gateway-inference-objective", "first"),
        ("x-llm-d-inference-objective", "first"),
        ("x-envoy-retry-on", "5xx"),
        ("x-envoy-upstream-rq-timeout-ms", "1"),
        ("test-epp-endpoint-selection", "x"),
    )
    async with EchoUpstream("gateway") as gateway, EchoUpstream("v1") as worker:
        node = node_settings(tmp_path)
        here = registry(gateway=(endpoint(gateway.port),), sparse_inference=(endpoint(worker.port),))
        async with EnvoyProcess(translate(base_policy(), here, node), node):
            async with channel(node.ingress_port, "models.example") as calls:
                public = calls.unary_unary("/autoglm.gateway.v1.GatewayService/Say")
                assert await public(b"x", timeout=10, metadata=(*forged, ("x-mine", "kept"))) == b"gateway"
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await calls.unary_unary(SAY)(b"x", timeout=10)
                assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
            async with httpx.AsyncClient() as client:
                for path in ("/", "/stats", "/autoglm.sparse_inference.v1.SparseInferenceService/Generate"):
                    reply = await client.get(f"http://127.0.0.1:{node.ingress_port}{path}")
                    assert reply.status_code == 404
        names = gateway.metadata[0].keys()
        assert "x-mine" in names
        assert not names & {name for name, _ in forged}
        assert worker.metadata == []


async def test_the_picker_is_told_the_subset_and_obeyed(tmp_path: Path) -> None:
    """Envoy's weights choose the subset, the picker the worker within it; a caller's own choice counts for nothing."""
    async with EchoUpstream("a") as a, EchoUpstream("b") as b, EchoUpstream("canary") as canary:
        node, port = node_settings(tmp_path), free_port()
        here = registry(
            sparse_inference=(endpoint(a.port), endpoint(b.port), endpoint(canary.port, "canary")),
            scheduler=(endpoint(port),),
        )
        targets = {"version=v1": f"127.0.0.1:{b.port}", "version=canary": f"127.0.0.1:{canary.port}"}
        snapshot = translate(weighted(50, 50, is_picked=True), here, node)
        async with (
            PickerProcess(port, targets) as picker,
            EnvoyProcess(snapshot, node),
            channel(node.outbound_port, WORKERS) as calls,
        ):
            own_choice = (("x-gateway-destination-endpoint", f"127.0.0.1:{a.port}"), ("x-autoglm-tenant", "t"))
            served = Counter()
            for _ in range(30):
                answer = await calls.unary_unary(SAY)(b"x" * 100, timeout=10, metadata=own_choice)
                served[answer] += 1
                seen = await picker.seen()
                assert seen["parts"] == ["request_headers", "request_body", "response_headers"]
                assert seen["labels"] == ("version=v1" if answer == b"b" else "version=canary")
                assert seen["served"] == targets[seen["labels"]]
                assert seen["body_bytes"] == 105
                assert seen["headers"]["x-autoglm-tenant"] == "t"
                assert "x-gateway-destination-endpoint" not in seen["headers"]
            assert set(served) == {b"b", b"canary"}


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
async def test_no_request_fails_when_the_picker_dies_or_hangs(tmp_path: Path, blow: signal.Signals) -> None:
    """FailOpen holds at any moment: calls under way, a bidirectional stream, and everything that comes after."""
    async with EchoUpstream("a") as a, EchoUpstream("b") as b:
        node, port = replace(node_settings(tmp_path), picker_message_timeout_s=0.3), free_port()
        here = registry(sparse_inference=(endpoint(a.port), endpoint(b.port)), scheduler=(endpoint(port),))
        snapshot = translate(weighted(100, 0, is_picked=True), here, node)
        async with (
            PickerProcess(port, {"version=v1": f"127.0.0.1:{b.port}"}) as picker,
            EnvoyProcess(snapshot, node) as envoy,
            channel(node.outbound_port, WORKERS) as calls,
        ):
            both_ways = calls.stream_stream(ECHO)(timeout=50)
            await both_ways.write(b"before")
            assert await both_ways.read() == b"before"
            answers: Counter[bytes] = Counter()
            struck, fallen_back = asyncio.Event(), asyncio.Event()

            async def load_on() -> None:
                while not fallen_back.is_set():
                    answers[await calls.unary_unary(SAY)(b"x" * 20_000, timeout=20)] += 1
                    if answers[b"b"] >= 40 and not struck.is_set():  # once: the pid is gone soon after
                        struck.set()
                        os.kill(picker.process.pid, blow)
                    if answers[b"a"] >= 10:
                        fallen_back.set()

            async with asyncio.TaskGroup() as group:
                for _ in range(8):
                    group.create_task(load_on())
            for text in (b"after", b"more"):
                await both_ways.write(text)
                assert await both_ways.read() == text
            await both_ways.done_writing()
            assert await both_ways.read() is grpc.aio.EOF
            assert int((await envoy.stats())["http.outbound.ext_proc.failure_mode_allowed"]) > 0
            assert {len(body) for body in a.bodies + b.bodies} == {20_000}


async def test_a_host_nobody_knows_is_answered_at_once(tmp_path: Path) -> None:
    """No open proxy: an unknown authority is a clear error, and so is a service without endpoints."""
    node = node_settings(tmp_path)
    async with EnvoyProcess(translate(base_policy(), registry(), node), node):
        for authority in ("example.com", "cache.autoglm.svc.cluster.local"):
            async with channel(node.outbound_port, authority) as calls:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await calls.unary_unary(SAY)(b"x", timeout=10)
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_short_names_and_ports_mean_the_same_service(tmp_path: Path) -> None:
    """All forms of a service's name that Kubernetes resolves reach it."""
    async with EchoUpstream("cache") as cache:
        node: NodeSettings = node_settings(tmp_path)
        async with EnvoyProcess(translate(base_policy(), registry(cache=(endpoint(cache.port),)), node), node):
            for name in ("cache", "cache.autoglm", "cache.autoglm.svc", "cache.autoglm.svc.cluster.local"):
                for authority in (name, f"{name}:50051"):
                    async with channel(node.outbound_port, authority) as calls:
                        assert await calls.unary_unary(SAY)(b"x", timeout=10) == b"cache"
