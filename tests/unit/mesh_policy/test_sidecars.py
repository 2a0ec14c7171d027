"""Sidecars in one Envoy, pinned: names, certificates, TLS parameters and inbound semantics of Istio 1.30.3."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from services.mesh.policy import Policy, load
from services.mesh.registry import Endpoint, Registry, Service, ServicePort, Workload
from services.mesh.translate import Caller, InboundPort, NodeSettings, Sidecar, translate

BASE = load(Path(__file__).resolve().parents[3] / "istio" / "base")
GRPC, REST = ServicePort("grpc", 50051, "grpc"), ServicePort("rest", 8000, "http")
WORKERS, CACHE = (f"{name}.autoglm.svc.cluster.local" for name in ("sparse-inference", "cache"))
HOME = Path("/run/identity")
NODE = NodeSettings(
    Path("/run/mesh"),
    callers=(
        Caller("gateway", 15001, frozenset({"tokenizer", "sparse-inference"})),
        Caller("sparse-inference", 15002, frozenset({"cache"})),
    ),
    sidecars=(
        Sidecar(
            Workload("gateway-0", "autoglm", "gateway", {"app": "gateway"}),
            "gateway",
            (InboundPort(50051, "grpc", 20001, 30001), InboundPort(8000, "http", 20002, 30002)),
        ),
    ),
    identities=HOME,
)


def registry(*, has_sidecar: bool = True) -> Registry:
    """The services of istio/base, with one worker."""
    worker = Endpoint("127.0.0.1", 20003, {"app": "sparse-inference", "version": "v1"}, has_sidecar=has_sidecar)
    return Registry(
        (
            Service("gateway", "autoglm", (GRPC, REST)),
            *(Service(name, "autoglm", (GRPC,)) for name in ("tokenizer", "scheduler", "cache")),
            Service("sparse-inference", "autoglm", (GRPC,), {"grpc": (worker,)}, {"app": "sparse-inference"}),
        )
    )


def named(items: tuple[dict[str, Any], ...], name: str) -> dict[str, Any]:
    """One resource."""
    return next(item for item in items if item["name"] == name)


SNAPSHOT = translate(BASE, registry(), NODE)


def test_each_caller_has_its_own_clusters_and_only_those_it_can_use() -> None:
    """The gateway never sees the cache, workers never each other; the picker comes with the host it picks for."""
    assert {name.partition("|50051|")[0] + "|" + name.rpartition("|")[2].partition(".")[0] for name in _owned()} == {
        "gateway~outbound|tokenizer",
        "gateway~outbound|sparse-inference",
        "gateway~outbound|scheduler",
        "sparse-inference~outbound|cache",
        "ingress~outbound|gateway",
        "ingress~outbound|8000||gateway.autoglm.svc.cluster.local|gateway",
        "ingress~outbound|8000|conversation|gateway.autoglm.svc.cluster.local|gateway",
    }
    listeners = {item["name"] for item in SNAPSHOT.listeners}
    assert {"gateway~outbound", "sparse-inference~outbound", "ingress"} <= listeners
    by_name = {item["name"]: item for item in SNAPSHOT.routes}
    hosts = {host["name"] for host in by_name["sparse-inference~outbound"]["virtual_hosts"]}
    assert hosts == {f"{CACHE}:50051", "block_all"}


def _owned() -> list[str]:
    return [item["name"] for item in SNAPSHOT.clusters if "~outbound|" in item["name"]]


def test_endpoints_are_shared_between_callers() -> None:
    """One file per service port and subset, whoever calls."""
    names = [item["cluster_name"] for item in SNAPSHOT.endpoints]
    assert len(set(names)) == len(names) and not any("~" in name for name in names)
    cluster = named(SNAPSHOT.clusters, f"gateway~outbound|50051|v1|{WORKERS}")
    assert cluster["eds_cluster_config"]["service_name"] == f"outbound|50051|v1|{WORKERS}"
    assert cluster["alt_stat_name"] == f"gateway~outbound|50051|v1|{WORKERS};"


def test_a_caller_shows_its_certificate_and_checks_the_servers_name() -> None:
    """Automatic mutual TLS: Istio's SNI, ALPN, versions and ciphers; the name of the service's account; else plain."""
    secure, plain = named(SNAPSHOT.clusters, f"gateway~outbound|50051|v1|{WORKERS}")["transport_socket_matches"]
    assert (secure["match"], plain["match"]) == ({"tlsMode": "istio"}, {})
    assert plain["transport_socket"]["name"] == "envoy.transport_sockets.raw_buffer"
    assert secure["transport_socket"]["typed_config"] == {
        "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
        "sni": f"outbound_.50051_.v1_.{WORKERS}",
        "common_tls_context": {
            "tls_params": TLS,
            "alpn_protocols": ["istio-peer-exchange", "istio", "h2"],
            "tls_certificate_sds_secret_configs": [_secret("default", "gateway")],
            "combined_validation_context": {
                "default_validation_context": {
                    "match_typed_subject_alt_names": [
                        {
                            "san_type": "URI",
                            "matcher": {"exact": "spiffe://cluster.local/ns/autoglm/sa/sparse-inference"},
                        }
                    ]
                },
                "validation_context_sds_secret_config": _secret("ROOTCA", "root"),
            },
        },
    }


@pytest.mark.parametrize("has_sidecar", [True, False])
def test_only_endpoints_with_a_sidecar_are_called_by_tls(has_sidecar: bool) -> None:
    """The endpoint says so in the metadata that the transport is matched by."""
    snapshot = translate(BASE, registry(has_sidecar=has_sidecar), NODE)
    group = next(item for item in snapshot.endpoints if item["cluster_name"] == f"outbound|50051|v1|{WORKERS}")
    metadata = group["endpoints"][0]["lb_endpoints"][0].get("metadata")
    marked = {"filter_metadata": {"envoy.transport_socket_match": {"tlsMode": "istio"}}}
    assert metadata == (marked if has_sidecar else None)


def test_the_picker_is_asked_by_the_caller_and_only_where_it_is_needed() -> None:
    """Envoy's own call carries the gateway's identity; workers, which call no picked host, have no such filter."""
    filters = {
        item["name"]: [part["name"] for part in item["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"]]
        for item in SNAPSHOT.listeners
    }
    assert "envoy.filters.http.ext_proc" in filters["gateway~outbound"]
    for name in ("sparse-inference~outbound", "ingress", "gateway-0~inbound|50051||"):
        assert "envoy.filters.http.ext_proc" not in filters[name]
    manager = named(SNAPSHOT.listeners, "gateway~outbound")["filter_chains"][0]["filters"][0]["typed_config"]
    assert manager["http_filters"][0]["typed_config"]["grpc_service"]["envoy_grpc"] == {
        "cluster_name": "gateway~outbound|50051||scheduler.autoglm.svc.cluster.local",
        "authority": "scheduler.autoglm.svc.cluster.local:50051",
    }


def test_the_inbound_side_adds_no_timeout_and_no_retry_and_says_who_calls() -> None:
    """Istio's inbound route; the certificate is asked for; the process is on the loopback, HTTP/1.1 for REST."""
    listener = named(SNAPSHOT.listeners, "gateway-0~inbound|50051||")
    assert listener["address"]["socket_address"] == {"address": "127.0.0.1", "port_value": 20001}
    assert listener["traffic_direction"] == "INBOUND"
    secure = next(chain for chain in listener["filter_chains"] if "transport_socket" in chain)
    context = secure["transport_socket"]["typed_config"]
    assert context["require_client_certificate"] is True
    assert context["common_tls_context"]["alpn_protocols"] == ["h2", "http/1.1"]
    assert context["common_tls_context"]["tls_params"] == TLS
    assert context["common_tls_context"]["tls_certificate_sds_secret_configs"] == [_secret("default", "gateway")]
    manager = secure["filters"][0]["typed_config"]
    assert manager["forward_client_cert_details"] == "APPEND_FORWARD"
    assert manager["set_current_client_cert_details"] == {"uri": True}
    assert manager["route_config"]["virtual_hosts"][0]["routes"][0]["route"] == {
        "cluster": "gateway-0~inbound|50051||",
        "timeout": "0s",
        "max_stream_duration": {"max_stream_duration": "0s", "grpc_timeout_header_max": "0s"},
    }
    process = named(SNAPSHOT.clusters, "gateway-0~inbound|8000||")
    target = process["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"]["socket_address"]
    assert target == {"address": "127.0.0.1", "port_value": 30002}
    options = next(iter(process["typed_extension_protocol_options"].values()))
    assert options["explicit_http_config"] == {"http_protocol_options": {}}


def test_inbound_listeners_do_not_depend_on_readiness() -> None:
    """A process that comes or goes changes endpoints only."""
    nobody = Registry(tuple(replace(service, endpoints={}) for service in registry().services))
    before = translate(BASE, nobody, NODE)
    files = [name for step in SNAPSHOT.steps_from(before) for name in step.files]
    assert files and all(name.startswith("eds/") for name in files)


def test_a_sidecar_without_certificates_is_not_made() -> None:
    """It would let everybody in while it looks like protection."""
    with pytest.raises(ValueError, match="identities"):
        replace(NODE, identities=None)


def test_without_accounts_there_is_one_caller_and_no_tls() -> None:
    """What a proxy with one owner looks like, as in a cluster's own configuration: Istio's names, nobody's prefix."""
    snapshot = translate(Policy(), registry(has_sidecar=False), NodeSettings(Path("/run/mesh")))
    assert [item["name"] for item in snapshot.listeners] == ["outbound"]
    assert not any("~" in item["name"] or "transport_socket_matches" in item for item in snapshot.clusters)


TLS = {
    "tls_minimum_protocol_version": "TLSv1_2",
    "tls_maximum_protocol_version": "TLSv1_3",
    "cipher_suites": [
        "ECDHE-ECDSA-AES256-GCM-SHA384",
        "ECDHE-RSA-AES256-GCM-SHA384",
        "ECDHE-ECDSA-AES128-GCM-SHA256",
        "ECDHE-RSA-AES128-GCM-SHA256",
        "AES256-GCM-SHA384",
        "AES128-GCM-SHA256",
    ],
}


def _secret(name: str, folder: str) -> dict[str, Any]:
    source = {"path": f"{HOME}/{folder}/sds.json"}
    return {"name": name, "sds_config": {"path_config_source": source, "resource_api_version": "V3"}}
