"""Mutual TLS between sidecars on a real Envoy: who gets in, who is refused, and certificates that change under load."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest

from services.mesh.identity import Authority
from services.mesh.identity.files import write_certificate
from services.mesh.policy import Policy
from services.mesh.policy.destination_rule import DestinationRule
from services.mesh.policy.security import PeerAuthentication
from services.mesh.translate import translate
from services.mesh.translate.tls import Mode
from tests.fakes.echo_upstream import SAY, STREAM, EchoUpstream, channel
from tests.fakes.envoy_process import EnvoyProcess, validate
from tests.fakes.sidecars import CALLER, HOST, SERVICE, Sidecars, certificate, client_context, connect, sidecars

ROTATIONS = 20


@asynccontextmanager
async def mesh(
    directory: Path, mode: Mode, policy: Policy | None = None, account: str = SERVICE
) -> AsyncIterator[tuple[EchoUpstream, Sidecars, EnvoyProcess]]:
    """The service, its sidecar in `mode`, and Envoy."""
    async with EchoUpstream(SERVICE) as process:
        made = sidecars(directory, process.port, account)
        snapshot = translate(replace(policy or Policy(), peer_authentications=(peer(mode),)), made.registry, made.node)
        async with EnvoyProcess(snapshot, made.node) as envoy:
            yield process, made, envoy


def peer(mode: Mode) -> PeerAuthentication:
    """What every sidecar of the namespace asks of its callers."""
    metadata, spec = {"name": "default", "namespace": "autoglm"}, {"mtls": {"mode": mode}}
    document = {"apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication", "metadata": metadata, "spec": spec}
    return PeerAuthentication.model_validate_json(json.dumps(document))


def rule(**tls: object) -> Policy:
    """A DestinationRule for the service."""
    spec = {"host": SERVICE, "trafficPolicy": {"tls": tls}}
    metadata = {"name": SERVICE, "namespace": "autoglm"}
    document = {"apiVersion": "networking.istio.io/v1", "kind": "DestinationRule", "metadata": metadata, "spec": spec}
    return Policy(destination_rules=(DestinationRule.model_validate_json(json.dumps(document)),))


async def say(port: int, **options: object) -> bytes:
    """One call through a listener."""
    async with channel(port, HOST) as calls:
        answer: bytes = await calls.unary_unary(SAY)(b"x", timeout=10, **options)  # type: ignore[arg-type]
        return answer


@pytest.mark.parametrize("mode", ["STRICT", "PERMISSIVE"])
async def test_the_process_learns_who_called_and_from_nobody_else(tmp_path: Path, mode: Mode) -> None:
    """x-forwarded-client-cert names the caller's SPIFFE id; what the caller itself wrote there does not arrive."""
    async with mesh(tmp_path, mode) as (process, made, envoy):
        forged = (("x-forwarded-client-cert", "URI=spiffe://cluster.local/ns/autoglm/sa/gateway"),)
        assert await say(made.outbound, metadata=forged) == SERVICE.encode()
        told = process.metadata[0]["x-forwarded-client-cert"]
        assert f"URI=spiffe://cluster.local/ns/autoglm/sa/{CALLER}" in told
        assert f"By=spiffe://cluster.local/ns/autoglm/sa/{SERVICE}" in told
        assert "gateway" not in told
        stats = await envoy.stats()
        name = f"{CALLER}~outbound|50051||{HOST};"
        assert stats[f"cluster.{name}.ssl.handshake"] == "1"
        assert [key for key in stats if key.startswith(f"cluster.{name}.ssl.versions.")] != []


async def test_a_strict_port_refuses_everyone_without_a_valid_certificate(tmp_path: Path) -> None:
    """Plaintext, no certificate, another authority's, an expired one: refused, and the process never hears of them."""
    stranger = Authority.create(timedelta(days=1), datetime.now(UTC))
    async with mesh(tmp_path, "STRICT") as (process, made, _):
        good = client_context(tmp_path, made.authority, certificate(made.authority))
        assert await asyncio.to_thread(connect, made.inbound, good) == _serial(made)
        for shown in (
            None,
            certificate(stranger),
            certificate(made.authority, lifetime=timedelta(hours=1), age=timedelta(hours=2)),
        ):
            bad = client_context(tmp_path, made.authority, shown)
            with pytest.raises(OSError):
                await asyncio.to_thread(connect, made.inbound, bad)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await say(made.inbound)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert process.metadata == []


async def test_a_permissive_port_takes_both(tmp_path: Path) -> None:
    """While a mesh moves to mutual TLS: plain calls are served and prove nobody, TLS needs a certificate."""
    async with mesh(tmp_path, "PERMISSIVE") as (process, made, _):
        forged = (("x-forwarded-client-cert", f"URI=spiffe://cluster.local/ns/autoglm/sa/{CALLER}"),)
        assert await say(made.inbound, metadata=forged) == SERVICE.encode()
        assert "x-forwarded-client-cert" not in process.metadata[0]
        assert await say(made.outbound) == SERVICE.encode()
        assert "x-forwarded-client-cert" in process.metadata[1]
        anonymous = client_context(tmp_path, made.authority, None)
        with pytest.raises(OSError):
            await asyncio.to_thread(connect, made.inbound, anonymous)


async def test_a_rule_decides_how_callers_encrypt(tmp_path: Path) -> None:
    """DISABLE sends plaintext, which a strict port refuses; ISTIO_MUTUAL insists; names in the rule replace ours."""
    for policy, code in (
        (rule(mode="DISABLE"), grpc.StatusCode.UNAVAILABLE),
        (rule(mode="ISTIO_MUTUAL"), None),
        (rule(mode="ISTIO_MUTUAL", subjectAltNames=["spiffe://elsewhere/x"]), grpc.StatusCode.UNAVAILABLE),
    ):
        async with mesh(tmp_path, "STRICT", policy) as (_, made, _):
            if code is None:
                assert await say(made.outbound) == SERVICE.encode()
                continue
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await say(made.outbound)
            assert caught.value.code() is code


async def test_callers_refuse_a_server_that_is_somebody_else(tmp_path: Path) -> None:
    """A certificate of the same authority under another account's name: no request is sent."""
    async with mesh(tmp_path, "STRICT", account="tokenizer") as (process, made, envoy):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await say(made.outbound)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        stats = await envoy.stats()
        assert int(stats[f"cluster.{CALLER}~outbound|50051||{HOST};.ssl.fail_verify_san"]) > 0
        assert process.metadata == []


async def test_callers_refuse_an_expired_server_and_another_authoritys(tmp_path: Path) -> None:
    """The server's certificate becomes a bad one while Envoy runs: new connections fail, a good one heals them."""
    stranger = Authority.create(timedelta(days=1), datetime.now(UTC))
    async with mesh(tmp_path, "STRICT") as (_, made, envoy):
        home = made.node.identities
        assert home is not None
        failed = f"cluster.{CALLER}~outbound|50051||{HOST};.ssl.fail_verify_error"
        for bad in (
            certificate(stranger, SERVICE),
            certificate(made.authority, SERVICE, timedelta(hours=1), age=timedelta(hours=2)),
        ):
            write_certificate(home, SERVICE, bad)
            await _until_served(envoy, bad.serial)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await say(made.outbound)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert int((await envoy.stats())[failed]) >= 2
        made.identities.rotate()
        await _until_served(envoy, _serial(made))
        assert await say(made.outbound) == SERVICE.encode()


async def test_certificates_rotate_under_load_without_a_failed_call(tmp_path: Path) -> None:
    """Twenty rotations: a stream runs through all, no call fails, new connections are shown each new serial."""
    async with mesh(tmp_path, "STRICT") as (process, made, envoy), channel(made.outbound, HOST) as calls:
        stream = calls.unary_stream(STREAM)(b"")
        assert await stream.read() == SERVICE.encode()
        stop, served = asyncio.Event(), 0

        async def load_on() -> None:
            nonlocal served
            while not stop.is_set():
                assert await say(made.outbound) == SERVICE.encode()
                served += 1

        shown = set()
        context = client_context(tmp_path, made.authority, certificate(made.authority))
        async with asyncio.TaskGroup() as group:
            loads = [group.create_task(load_on()) for _ in range(2)]
            for _ in range(ROTATIONS):
                made.identities.rotate()
                serial = _serial(made)
                await _until_served(envoy, serial)
                assert await asyncio.to_thread(connect, made.inbound, context) == serial
                shown.add(serial)
                process.release()
                assert await stream.read() == SERVICE.encode()
            stop.set()
        assert len(loads) == 2 and len(shown) == ROTATIONS and served > 0
        process.release(is_last=True)
        assert await stream.read() is grpc.aio.EOF
        assert await stream.code() is grpc.StatusCode.OK
        stats = await envoy.stats()
        assert not [name for name, value in stats.items() if "key_rotation_failed" in name and value != "0"]


async def test_metrics_have_istios_cluster_names_and_say_who_calls(tmp_path: Path) -> None:
    """The caller is a label of its own, so that a sum over callers is what a sidecar of Istio's would report."""
    async with mesh(tmp_path, "STRICT") as (_, made, envoy):
        assert await say(made.outbound) == SERVICE.encode()
        page = await asyncio.to_thread(envoy._get, "/stats/prometheus?filter=handshake|upstream_rq_total")
        labels = f'{{cluster_name="outbound|50051||{HOST}",source_workload="{CALLER}"}}'
        assert f"envoy_cluster_ssl_handshake{labels} 1" in page
        assert f"envoy_cluster_upstream_rq_total{labels} 1" in page


async def test_connections_end_where_policy_bounds_their_life(tmp_path: Path) -> None:
    """maxConnectionDuration: callers connect anew after a while, so a rotation reaches busy connections, too."""
    policy = rule(mode="ISTIO_MUTUAL")
    traffic = policy.destination_rules[0].model_dump(mode="json", by_alias=True, exclude_unset=True)
    traffic["spec"]["trafficPolicy"]["connectionPool"] = {"tcp": {"maxConnectionDuration": "0.2s"}}
    policy = replace(policy, destination_rules=(DestinationRule.model_validate_json(json.dumps(traffic)),))
    async with mesh(tmp_path, "STRICT", policy) as (_, made, envoy):
        handshakes = f"cluster.{CALLER}~outbound|50051||{HOST};.ssl.handshake"
        while int((await envoy.stats()).get(handshakes, "0")) < 3:
            assert await say(made.outbound) == SERVICE.encode()


@pytest.mark.parametrize("mode", ["STRICT", "PERMISSIVE", "DISABLE"])
async def test_envoy_accepts_sidecars_in_every_mode(tmp_path: Path, mode: Mode) -> None:
    """The whole configuration passes `envoy --mode validate`, certificates as files."""
    made = sidecars(tmp_path, 1)
    policy = Policy(peer_authentications=(peer(mode),))
    status, log = await validate(translate(policy, made.registry, made.node).static(), tmp_path)
    assert status == 0, log


def _serial(made: Sidecars) -> str:
    """Of the certificate that the service has now."""
    return next(item.certificate.serial for item in made.identities.issued if item.account == SERVICE)


async def _until_served(envoy: EnvoyProcess, serial: str) -> None:
    """Until Envoy holds the certificate of that serial."""
    while serial not in {item.serial for item in await envoy.admin.certificates()}:  # noqa: ASYNC110  # another program's state
        await asyncio.sleep(0.01)
