"""Mirroring, hashing and retries on a real Envoy: what a shadow does to its primary, and where a request goes twice."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from services.mesh.policy import Policy
from services.mesh.policy.destination_rule import DestinationRule
from services.mesh.policy.virtual_service import VirtualService
from services.mesh.registry import Endpoint, Registry, Service, ServicePort
from services.mesh.translate import translate
from tests.fakes.echo_upstream import SAY, STREAM, EchoUpstream, channel
from tests.fakes.envoy_process import EnvoyProcess, free_port, node_settings

HEAD = {"apiVersion": "networking.istio.io/v1", "metadata": {"name": "cache", "namespace": "autoglm"}}
GRPC = ServicePort("grpc", 50051, "grpc")
REQUESTS = 200


def policy(route: dict[str, Any], rule: dict[str, Any]) -> Policy:
    """One VirtualService and one DestinationRule for the host `cache`."""
    service = HEAD | {"kind": "VirtualService", "spec": {"hosts": ["cache"], "http": [route]}}
    destination = HEAD | {"kind": "DestinationRule", "spec": {"host": "cache"} | rule}
    return Policy(
        virtual_services=(VirtualService.model_validate_json(json.dumps(service)),),
        destination_rules=(DestinationRule.model_validate_json(json.dumps(destination)),),
    )


def registry(*endpoints: Endpoint) -> Registry:
    """The host `cache` with these endpoints."""
    return Registry((Service("cache", "autoglm", (GRPC,), {"grpc": endpoints}, {"app": "cache"}),))


def mirrored(percent: float) -> Policy:
    """To v1, and a share to the canary as well."""
    shadow = {"destination": {"host": "cache", "subset": "canary"}, "percentage": {"value": percent}}
    subsets = [{"name": name, "labels": {"version": name}} for name in ("v1", "canary")]
    return policy(
        {"route": [{"destination": {"host": "cache", "subset": "v1"}}], "mirrors": [shadow]}, {"subsets": subsets}
    )


class Failing(EchoUpstream):
    """Refuses whatever it is asked, and counts."""

    async def _say(self, request: bytes, context: "grpc.aio.ServicerContext[Any, Any]") -> bytes:
        self.bodies.append(request)
        await context.abort(grpc.StatusCode.UNAVAILABLE, "no")


class Silent(EchoUpstream):
    """Takes requests and never answers."""

    async def _say(self, request: bytes, context: "grpc.aio.ServicerContext[Any, Any]") -> bytes:
        self.bodies.append(request)
        await asyncio.Event().wait()
        raise AssertionError


@asynccontextmanager
async def shadow(kind: str) -> AsyncIterator[tuple[int, EchoUpstream | None]]:
    """A shadow's port; dead ones have nobody there."""
    if kind == "dead":
        yield free_port(), None
        return
    kinds: dict[str, type[EchoUpstream]] = {"silent": Silent, "failing": Failing, "well": EchoUpstream}
    async with kinds[kind]("canary") as server:
        yield server.port, server


@pytest.mark.parametrize("kind", ["well", "dead", "silent", "failing"])
async def test_the_primary_answers_all_whatever_its_shadow_does(tmp_path: Path, kind: str) -> None:
    """Each call is answered by v1 alone and once; the shadow gets its share, and its answers go nowhere."""
    node = node_settings(tmp_path)
    async with EchoUpstream("v1") as primary, shadow(kind) as (port, other):
        here = registry(
            Endpoint("127.0.0.1", primary.port, {"version": "v1"}), Endpoint("127.0.0.1", port, {"version": "canary"})
        )
        async with EnvoyProcess(translate(mirrored(25), here, node), node) as proxy:
            async with channel(node.outbound_port, "cache") as calls:
                answers = [await calls.unary_unary(SAY)(str(n).encode(), timeout=10) for n in range(REQUESTS)]
            assert set(answers) == {b"v1"}
            assert sorted(primary.bodies) == sorted(str(n).encode() for n in range(REQUESTS))
            name = "cluster.outbound|50051|canary|cache.autoglm.svc.cluster.local;.upstream_rq_"
            stats = await proxy.stats()
            sent = int(stats[f"{name}total"]) + int(stats[f"{name}pending_failure_eject"])
            assert 22 <= sent <= 80  # 99.99 % of the time, for a quarter of 200
            if other is not None:
                await proxy.until(lambda _: len(other.bodies) >= int(stats[f"{name}total"]))
                assert set(other.bodies) <= set(primary.bodies)


async def test_streams_are_mirrored_too_and_end_for_themselves(tmp_path: Path) -> None:
    """The primary's stream runs at its own pace to its own end while the shadow's is still open."""
    node = node_settings(tmp_path)
    async with EchoUpstream("v1") as primary, EchoUpstream("canary") as other:
        here = registry(
            Endpoint("127.0.0.1", primary.port, {"version": "v1"}),
            Endpoint("127.0.0.1", other.port, {"version": "canary"}),
        )
        async with EnvoyProcess(translate(mirrored(100), here, node), node) as proxy:
            async with channel(node.outbound_port, "cache") as calls:
                stream = calls.unary_stream(STREAM)(b"")
                assert await stream.read() == b"v1"
                active = "cluster.outbound|50051|canary|cache.autoglm.svc.cluster.local;.upstream_rq_active"
                await proxy.until(lambda stats: stats.get(active) == "1")
                primary.release()
                assert await stream.read() == b"v1"
                primary.release(is_last=True)
                assert await stream.read() is grpc.aio.EOF
                assert await stream.code() is grpc.StatusCode.OK
                assert (await proxy.stats())[active] == "1"
                other.release(is_last=True)
                await proxy.until(lambda stats: stats[active] == "0")


async def test_one_conversation_stays_with_one_endpoint(tmp_path: Path) -> None:
    """The header's hash decides; other conversations spread, and calls without the header do as well."""
    rule = {"trafficPolicy": {"loadBalancer": {"consistentHash": {"httpHeaderName": "x-conversation-id"}}}}
    node = node_settings(tmp_path)
    async with EchoUpstream("a") as a, EchoUpstream("b") as b, EchoUpstream("c") as c:
        here = registry(*(Endpoint("127.0.0.1", item.port) for item in (a, b, c)))
        snapshot = translate(policy({"route": [{"destination": {"host": "cache"}}]}, rule), here, node)
        async with EnvoyProcess(snapshot, node), channel(node.outbound_port, "cache") as calls:
            seen: dict[str, Counter[bytes]] = {}
            for turn in range(4):
                for number in range(24):
                    name = f"conversation-{number}"
                    metadata = (("x-conversation-id", name),)
                    answer = await calls.unary_unary(SAY)(str(turn).encode(), timeout=10, metadata=metadata)
                    seen.setdefault(name, Counter())[answer] += 1
            assert {len(found) for found in seen.values()} == {1}
            assert {answer for found in seen.values() for answer in found} == {b"a", b"b", b"c"}
            without = {await calls.unary_unary(SAY)(b"x", timeout=10) for _ in range(40)}
            assert len(without) == 3


@pytest.mark.parametrize("goes_elsewhere", [True, False])
async def test_a_retry_goes_to_another_place_where_the_policy_says_so(tmp_path: Path, goes_elsewhere: bool) -> None:
    """retryRemoteLocalities: the near place refuses, the far one answers; without it the caller sees the refusal."""
    route = {
        "route": [{"destination": {"host": "cache"}}],
        "retries": {"attempts": 3, "retryOn": "unavailable", "retryRemoteLocalities": goes_elsewhere},
    }
    # Ejection is on, as places have ranks only then, and so patient that it never comes.
    rule = {"trafficPolicy": {"outlierDetection": {"consecutive5xxErrors": 1000, "maxEjectionPercent": 100}}}
    node = node_settings(tmp_path)
    near = replace(node, locality="aws/a/1")
    async with Failing("near") as here_failing, EchoUpstream("far") as far:
        here = registry(
            Endpoint("127.0.0.1", here_failing.port, {}, "aws/a/1"), Endpoint("127.0.0.1", far.port, {}, "gcp/b/2")
        )
        async with EnvoyProcess(translate(policy(route, rule), here, near), near):
            async with channel(near.outbound_port, "cache") as calls:
                if goes_elsewhere:
                    for _ in range(20):
                        assert await calls.unary_unary(SAY)(b"x", timeout=10) == b"far"
                else:
                    with pytest.raises(grpc.aio.AioRpcError) as caught:
                        await calls.unary_unary(SAY)(b"x", timeout=10)
                    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert here_failing.bodies  # the near place is asked first


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (
            {"abort": {"percentage": {"value": 100}, "grpcStatus": "RESOURCE_EXHAUSTED"}},
            grpc.StatusCode.RESOURCE_EXHAUSTED,
        ),
        ({"abort": {"percentage": {"value": 100}, "httpStatus": 503}}, grpc.StatusCode.UNAVAILABLE),
        ({"delay": {"percentage": {"value": 100}, "fixedDelay": "30s"}}, grpc.StatusCode.DEADLINE_EXCEEDED),
    ],
)
async def test_faults_fail_as_they_are_written(tmp_path: Path, fault: dict[str, Any], code: grpc.StatusCode) -> None:
    """Aborts carry their status and never reach the service; a delay outlasts the caller's deadline."""
    node = node_settings(tmp_path)
    async with EchoUpstream("a") as a:
        route = {"route": [{"destination": {"host": "cache"}}], "retries": {"attempts": 0}, "fault": fault}
        snapshot = translate(policy(route, {}), registry(Endpoint("127.0.0.1", a.port)), node)
        async with EnvoyProcess(snapshot, node), channel(node.outbound_port, "cache") as calls:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await calls.unary_unary(SAY)(b"x", timeout=1 if "delay" in fault else 10)
            assert caught.value.code() is code
        assert a.bodies == []
