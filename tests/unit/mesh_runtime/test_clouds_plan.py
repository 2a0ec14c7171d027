"""What clouds know of each other: offers, silence, returns; and the wide-area network between them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from services.mesh import ports
from services.mesh.clouds import network, plan, watches
from services.mesh.clouds.federation import Federation
from services.mesh.clouds.neighbours import CLUSTER_LABEL, Neighbours, Offer, Pace, Place, offer, placed
from services.mesh.clouds.wan import Distance, Wan, Way
from services.mesh.registry import Endpoint, Registry, Service, ServicePort

PACE = Pace(heartbeat_s=0.05, stale_s=1.0, ramp_s=10.0)
PLAN = Path(__file__).resolve().parents[3] / "deploy" / "local" / "clouds.yaml"


def registry(*ready: str, address: str = "10.0.0.1") -> Registry:
    """Two services with one port each; those in `ready` have an endpoint."""
    port = ServicePort("grpc", 50051, "grpc")
    return Registry(
        tuple(
            Service(
                name,
                "autoglm",
                (port,),
                {"grpc": (Endpoint(address, 7000, {"app": name}, has_sidecar=True),) if name in ready else ()},
            )
            for name in ("gateway", "cache")
        )
    )


def theirs(*ready: str) -> Offer:
    """What gcp offers."""
    there = placed(registry(*ready, address="10.0.0.2"), Place("gcp", "us-east4/us-east4-a"))
    return offer(there, "gcp", frozenset({"cache"}))


def endpoints(found: Registry, service: str) -> tuple[Endpoint, ...]:
    """The endpoints of a service."""
    return next(item.endpoints["grpc"] for item in found.services if item.name == service)


def test_another_clouds_endpoints_come_with_their_place_and_network() -> None:
    """Locality, labels and sidecar are theirs; the network is the cloud that told us; what is kept is not offered."""
    them = Neighbours(("gcp",), PACE)
    assert them.hear("gcp", theirs("gateway", "cache"), 0.0)
    found = them.joined(registry("gateway", "cache"), 0.0)
    (own, other) = endpoints(found, "gateway")
    assert (own.address, own.network) == ("10.0.0.1", "")
    assert (other.address, other.network, other.locality, other.has_sidecar, other.ramp) == (
        "10.0.0.2",
        "gcp",
        "us-east4/us-east4-a",
        True,
        1.0,
    )
    assert other.labels[CLUSTER_LABEL] == "gcp"
    assert [item.address for item in endpoints(found, "cache")] == ["10.0.0.1"]


def test_a_silent_cloud_loses_its_endpoints_and_gets_them_back_little_by_little() -> None:
    """After the limit, not before; a return begins with a tenth of the share and takes the whole ramp."""
    them = Neighbours(("gcp",), PACE)
    them.hear("gcp", theirs("gateway"), 0.0)
    assert them.expire(0.9) == []
    assert them.expire(1.1) == ["gcp"]
    assert len(endpoints(them.joined(registry("gateway"), 1.1), "gateway")) == 1
    them.hear("gcp", theirs("gateway"), 20.0)
    ramps = [endpoints(them.joined(registry(), now), "gateway")[0].ramp for now in (20.0, 22.5, 25.0, 29.0, 30.0)]
    assert ramps == [0.1, 0.2, 0.5, 0.9, 1.0]


def test_a_service_that_restarts_elsewhere_is_a_return_too() -> None:
    """Its cloud never went silent; the others of its services keep their share."""
    them = Neighbours(("gcp",), PACE)
    for at, ready in enumerate((("gateway",), (), ("gateway",))):
        them.hear("gcp", theirs(*ready), float(at))
    assert them.ramps(2.0) == {("gcp", "gateway"): 0.1}


def test_our_own_deafness_is_nobodys_silence() -> None:
    """Time in which this process could not listen does not count."""
    them = Neighbours(("gcp",), PACE)
    them.hear("gcp", theirs("gateway"), 0.0)
    assert them.expire(3.0, deaf_s=2.5) == []
    assert them.expire(4.0) == ["gcp"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"address": "example.com", "port": 1},
        {"address": "10.0.0.1", "port": 0},
        {"address": "10.0.0.1", "port": 1, "run": "x"},
    ],
)
def test_an_offer_is_read_as_a_strangers(wrong: dict[str, Any]) -> None:
    """Names instead of addresses, impossible ports and unknown fields are refused."""
    with pytest.raises(ValueError, match="validation error"):
        Offer.model_validate({"cloud": "gcp", "services": {"gateway": {"grpc": [wrong]}}})


async def test_two_clouds_hear_of_each_others_endpoints_and_of_their_loss() -> None:
    """Over a real socket: what becomes ready there is known here, and forgotten when the other falls silent."""
    supply = ports.free("127.0.0.1")
    one, two = next(supply), next(supply)
    changed = asyncio.Event()
    ready: list[str] = []
    pace = Pace(0.05, 0.5, 1.0)
    there = Federation("127.0.0.1", two, {}, pace, lambda: offer(registry(*ready), "gcp", frozenset()), lambda: None)
    here = Federation(
        "127.0.0.1", one, {"gcp": ("127.0.0.1", two)}, pace, lambda: offer(registry(), "aws", frozenset()), changed.set
    )

    async def until(count: int) -> None:
        while len(endpoints(here.joined(registry()), "gateway")) != count:
            changed.clear()
            await changed.wait()

    async with asyncio.timeout(20):
        running = [asyncio.create_task(item.run()) for item in (there, here)]
        ready.append("gateway")
        there.offer_changed()
        await until(1)
        running[0].cancel()
        await until(0)
        assert here.heard() == {"gcp": None}
        running[1].cancel()
        await asyncio.gather(*running, return_exceptions=True)


@asynccontextmanager
async def echo_behind(distance: Distance) -> AsyncIterator[int]:
    """A port that leads, over the distance, to a server that sends everything back."""

    async def back(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(back, "127.0.0.1", 0)
    port = next(ports.free("127.0.0.1"))
    wan = Wan([Way(("127.0.0.1", port), server.sockets[0].getsockname()[:2])], distance)
    await wan.open()
    try:
        yield port
    finally:
        await wan.close()
        server.close()


async def test_bytes_cross_the_distance_in_order_and_not_sooner_than_it_takes() -> None:
    """A megabyte comes back whole; the first byte needs both ways."""
    sent = bytes(range(256)) * 4096
    async with asyncio.timeout(30), echo_behind(Distance(0.05, 0.01)) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        began = time.monotonic()
        writer.write(sent)
        writer.write_eof()
        first = await reader.readexactly(1)
        assert time.monotonic() - began >= 0.08
        assert first + await reader.read(-1) == sent
        writer.close()


async def test_a_way_that_leads_nowhere_is_closed() -> None:
    """Whoever connects is told by the end of the connection, not left waiting."""
    supply = ports.free("127.0.0.1")
    port, nobody = next(supply), next(supply)
    wan = Wan([Way(("127.0.0.1", port), ("127.0.0.1", nobody))], Distance())
    await wan.open()
    async with asyncio.timeout(20):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await reader.readexactly(1)
        writer.close()
        await wan.close()


def test_the_plan_gives_every_pair_of_clouds_its_own_ways() -> None:
    """Each cloud reaches the others only by the proxies, and one authority signs for all."""
    spec = plan.load(PLAN)
    where = {name: f"10.0.0.{n}" for n, name in enumerate(spec.clouds)}
    sources = {name: iter(range(100, 200)) for name in spec.clouds}
    made = plan.plan(spec, Path("/run"), Path("istio"), where, "10.0.0.254", sources, iter(range(500, 600)))
    assert len({way.at for way in made.ways.values()}) == len(spec.clouds) * (len(spec.clouds) - 1) * len(plan.BETWEEN)
    told = [made.environment(cloud) for cloud in made.clouds]
    assert {item["AUTOGLM_CA_DIR"] for item in told} == {"/run/authority"}
    assert all("10.0.0.254" in item["AUTOGLM_EASTWEST_GATEWAYS"] for item in told)


def test_names_of_a_network_fit_the_kernel_and_come_from_the_run_directory() -> None:
    """Two runs never share a name, one run always finds its own again; interface names have at most 15 characters."""
    one, again, other = (network.network(Path(text)) for text in ("/a/run", "/a/run", "/b/run"))
    assert one == again
    names = [one.bridge, *(one.cable(cloud) for cloud in ("aws", "gcp", "azure"))]
    assert len(set(names)) == 4 and all(len(name) <= 15 for name in names)
    assert one.bridge != other.bridge


def test_room_for_file_watches_is_made_as_root_and_asked_for_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The change is told in words; without the right to make it, the remedy is; enough is left as it is."""
    limit = tmp_path / "max_user_instances"
    monkeypatch.setattr(watches, "LIMIT", limit)
    limit.write_text("128\n")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(watches.NoRoom, match=r"sysctl fs\.inotify\.max_user_instances=1024"):
        watches.make_room(3)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert "from 128 to 1024" in watches.make_room(3)
    assert limit.read_text() == "1024"
    assert watches.make_room(3) == ""
