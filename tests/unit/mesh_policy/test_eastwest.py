"""The way in for other clouds: which names lead somewhere, where they lead, and how the way out is watched."""

import itertools
from pathlib import Path
from typing import Any

from services.mesh import topology
from services.mesh.clouds.neighbours import Neighbours, Pace, Place, offer, placed
from services.mesh.policy import load
from services.mesh.translate import NodeSettings, Snapshot, translate

ROOT = Path(__file__).resolve().parents[3]
TOPOLOGY = topology.load(ROOT / "deploy" / "local" / "mesh.yaml", "sparse-inference/v1=1")
KEPT = frozenset(name for name, spec in TOPOLOGY.services.items() if spec.cluster_local)
POLICY = load(ROOT / "istio" / "clouds" / "aws")
WORKERS = "sparse-inference.autoglm.svc.cluster.local"
HERE, THERE, WAY = "10.0.0.1", "10.0.0.2", ("10.0.0.9", 20001)


def snapshot(**changes: Any) -> Snapshot:
    """What aws's Envoy is told while gcp is there, too."""
    instances = topology.instances(TOPOLOGY, itertools.count(20_000))
    own = placed(topology.registry(TOPOLOGY, "autoglm", HERE, instances), Place("aws", "us-east-1/us-east-1a"))
    gcp = placed(topology.registry(TOPOLOGY, "autoglm", THERE, instances), Place("gcp", "us-east4/us-east4-a"))
    others = Neighbours(("gcp",), Pace())
    others.hear("gcp", offer(gcp, "gcp", KEPT), 0.0)
    node = NodeSettings(
        run_directory=Path("/run/mesh"),
        callers=topology.callers(TOPOLOGY, itertools.count(30_000)),
        sidecars=topology.sidecars(TOPOLOGY, "autoglm", instances),
        identities=Path("/run/mesh/identity"),
        locality="us-east-1/us-east-1a",
        network="aws",
        network_gateways={"gcp": (WAY,)},
        eastwest_port=15443,
        eastwest_services=frozenset(TOPOLOGY.services) - KEPT,
        **changes,
    )
    return translate(POLICY, others.joined(own, 0.0), node)


def addresses(found: Snapshot, name: str) -> list[tuple[str, int]]:
    """Addresses of an endpoint resource with their priorities."""
    item = next(item for item in found.endpoints if item["cluster_name"] == name)
    return [
        (end["endpoint"]["address"]["socket_address"]["address"], group["priority"])
        for group in item["endpoints"]
        for end in group["lb_endpoints"]
    ]


def test_only_names_of_services_that_are_offered_lead_somewhere() -> None:
    """One chain per offered port and subset; not the scheduler, not the cache, and no cluster with a certificate."""
    found = snapshot()
    way = next(item for item in found.listeners if item["name"] == "eastwest")
    names = {name for chain in way["filter_chains"] for name in chain["filter_chain_match"]["server_names"]}
    assert f"outbound_.50051_.v1_.{WORKERS}" in names
    assert not [name for name in names if "scheduler" in name or "cache" in name]
    assert all(chain["filters"][0]["typed_config"]["cluster"] in names for chain in way["filter_chains"])
    clusters = {item["name"]: item for item in found.clusters}
    assert not [name for name in names if "transport_socket" in str(clusters[name].keys())]


def test_what_comes_from_another_cloud_is_never_sent_on_to_a_third() -> None:
    """Behind the door are this cloud's endpoints only; its own callers see the others' behind their gateway."""
    found = snapshot()
    assert addresses(found, f"here~outbound_.50051_.v1_.{WORKERS}") == [(HERE, 0)]
    assert addresses(found, f"outbound|50051|v1|{WORKERS}") == [(HERE, 0), (WAY[0], 1)]
    assert addresses(found, f"outbound|50051|only-gcp|{WORKERS}") == [(WAY[0], 0)]
    assert addresses(found, f"outbound|50051|only-azure|{WORKERS}") == []


def test_connections_to_sidecars_are_tried_when_asked_for() -> None:
    """Pings on every HTTP/2 connection of a caller, REST between clouds included; none by default."""
    name = "HttpProtocolOptions"

    def pings(found: Snapshot) -> set[str]:
        return {
            item["name"]
            for item in found.clusters
            for key, options in item.get("typed_extension_protocol_options", {}).items()
            if name in key
            and "connection_keepalive" in options["explicit_http_config"].get("http2_protocol_options", {})
        }

    tried = pings(snapshot(ping_interval_s=1.0))
    assert f"gateway~outbound|50051|v1|{WORKERS}" in tried
    assert "ingress~outbound|8000||gateway.autoglm.svc.cluster.local" in tried
    assert not [name for name in tried if "inbound" in name]
    assert pings(snapshot()) == set()
