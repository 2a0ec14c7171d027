"""Istio's defaults, pinned: what Envoy is told where the policy says nothing (semantics of Istio 1.30.3)."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from services.mesh.policy import Policy, load
from services.mesh.policy.destination_rule import ClientTls
from services.mesh.registry import Endpoint, Registry, Service, ServicePort
from services.mesh.translate import NodeSettings, translate
from services.mesh.translate.tls import client_side

GRPC = ServicePort("grpc", 50051, "grpc")
REST = ServicePort("http", 8000, "http")
NODE = NodeSettings(Path("/run/mesh"))
EVERYTHING = load(Path(__file__).with_name("everything"))
WORKERS = "sparse-inference.autoglm.svc.cluster.local"
WORKER_PLACES = ("aws/eu/a", "aws/eu/b", "aws/us", "gcp")


def registry() -> Registry:
    """The base services, with one worker in each of four places."""
    workers = tuple(
        Endpoint("127.0.0.1", 7000 + n, {"version": "v1" if n else "canary"}, place)
        for n, place in enumerate(WORKER_PLACES)
    )
    return Registry(
        (
            Service("gateway", "autoglm", (GRPC, REST), {"http": (Endpoint("127.0.0.1", 7100),)}),
            *(Service(name, "autoglm", (GRPC,)) for name in ("tokenizer", "scheduler", "cache")),
            Service("sparse-inference", "autoglm", (GRPC,), {"grpc": workers}, {"app": "sparse-inference"}),
        )
    )


def cluster(name: str, policy: Policy = EVERYTHING, node: NodeSettings = NODE) -> dict[str, Any]:
    """One translated cluster."""
    return next(item for item in translate(policy, registry(), node).clusters if item["name"] == name)


def routes(host: str, policy: Policy = EVERYTHING, node: NodeSettings = NODE) -> list[dict[str, Any]]:
    """The outbound routes of one virtual host."""
    hosts = translate(policy, registry(), node).routes[0]["virtual_hosts"]
    found: list[dict[str, Any]] = next(item["routes"] for item in hosts if item["name"] == host)
    return found


UNLIMITED = 4294967295
PREVIOUS_HOSTS = {
    "name": "envoy.retry_host_predicates.previous_hosts",
    "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate",
    },
}


def test_a_cluster_without_a_rule() -> None:
    """10 s to connect, no limits, least request, HTTP/2 for gRPC, Istio's names."""
    name = "outbound|50051||cache.autoglm.svc.cluster.local"
    directory = "/run/mesh/eds"
    assert cluster(name, Policy()) == {
        "@type": "type.googleapis.com/envoy.config.cluster.v3.Cluster",
        "name": name,
        "alt_stat_name": name + ";",
        "type": "EDS",
        "eds_cluster_config": {
            "service_name": name,
            "eds_config": {
                "path_config_source": {
                    "path": f"{directory}/outbound_.50051_._.cache.autoglm.svc.cluster.local.json",
                    "watched_directory": {"path": directory},
                },
                "resource_api_version": "V3",
            },
        },
        "connect_timeout": "10s",
        "per_connection_buffer_limit_bytes": 1048576,
        "circuit_breakers": {
            "thresholds": [
                {
                    "max_connections": UNLIMITED,
                    "max_pending_requests": UNLIMITED,
                    "max_requests": UNLIMITED,
                    "max_retries": UNLIMITED,
                    "track_remaining": False,
                }
            ]
        },
        "common_lb_config": {},
        "lb_policy": "LEAST_REQUEST",
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": {"http2_protocol_options": {}},
            }
        },
        "metadata": {
            "filter_metadata": {
                "istio": {
                    "services": [{"host": "cache.autoglm.svc.cluster.local"}],
                    "subset": "default",
                }
            }
        },
    }


def test_an_http_port_speaks_http_1() -> None:
    """Only gRPC and HTTP/2 ports get HTTP/2."""
    options = cluster("outbound|8000||gateway.autoglm.svc.cluster.local")["typed_extension_protocol_options"]
    assert next(iter(options.values()))["explicit_http_config"] == {"http_protocol_options": {}}


def test_a_route_without_a_rule() -> None:
    """No timeout, the caller's deadline honoured, two retries on other hosts."""
    assert routes("cache.autoglm.svc.cluster.local:50051", Policy()) == [
        {
            "name": "default",
            "match": {"prefix": "/"},
            "route": {
                "cluster": "outbound|50051||cache.autoglm.svc.cluster.local",
                "timeout": "0s",
                "max_grpc_timeout": "0s",
                "retry_policy": {
                    "retry_on": "connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes",
                    "num_retries": 2,
                    "host_selection_retry_max_attempts": 5,
                    "retry_host_predicate": [PREVIOUS_HOSTS],
                },
            },
        }
    ]


def test_a_consistent_hash_keeps_its_host_on_retry() -> None:
    """With consistentHash the default policy does not avoid the previous host, and the route hashes."""
    route = routes("cache.autoglm.svc.cluster.local:50051")[0]["route"]
    assert "retry_host_predicate" not in route["retry_policy"]
    assert route["hash_policy"] == [{"connection_properties": {"source_ip": True}}]
    name = "outbound|50051||cache.autoglm.svc.cluster.local"
    assert cluster(name)["ring_hash_lb_config"] == {"minimum_ring_size": 1024}
    assert cluster("outbound|50051||tokenizer.autoglm.svc.cluster.local")["ring_hash_lb_config"] == {
        "minimum_ring_size": 512
    }


def test_each_match_is_a_route_and_a_catch_all_ends_the_list() -> None:
    """`match` entries are alternatives; order is kept."""
    found = routes(f"{WORKERS}:50051")
    assert [route["name"] for route in found] == ["picky", "picky", "workers-1"]
    assert found[0]["match"] == {
        "path": "/a/B",
        "case_sensitive": False,
        "headers": [
            {"name": "x-a", "string_match": {"exact": "1"}},
            {"name": "x-b", "string_match": {"prefix": "p"}},
            {"name": "x-c", "string_match": {"safe_regex": {"regex": "[a-z]+"}}},
            {"name": "x-d", "present_match": True},
            {
                "name": "x-e",
                "string_match": {"exact": "2"},
                "invert_match": True,
                "treat_missing_header_as_empty": True,
            },
            {"name": "x-f", "present_match": True, "invert_match": True},
            {"name": ":method", "string_match": {"exact": "POST"}},
            {"name": ":authority", "string_match": {"prefix": "sparse"}},
            {"name": ":scheme", "string_match": {"exact": "http"}},
        ],
        "query_parameters": [{"name": "q", "string_match": {"exact": "3"}}, {"name": "r", "present_match": True}],
    }
    assert found[1]["match"] == {"safe_regex": {"regex": "/x/.*"}}
    assert "retry_policy" not in found[2]["route"]  # attempts: 0


def test_weights_headers_retries_faults_and_mirrors() -> None:
    """The fields of a route, in Envoy's words."""
    route = routes(f"{WORKERS}:50051")[0]
    action = route["route"]
    first, second = action["weighted_clusters"]["clusters"]
    assert (first["name"], first["weight"]) == (f"outbound|50051|v1|{WORKERS}", 75)
    assert (second["name"], second["weight"]) == (f"outbound|50051|canary|{WORKERS}", 25)
    assert first["request_headers_to_add"] == [
        {"header": {"key": "x-to", "value": "v1"}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"},
        {"header": {"key": "x-also", "value": "y"}, "append_action": "APPEND_IF_EXISTS_OR_ADD"},
    ]
    assert first["request_headers_to_remove"] == ["x-drop"]
    assert first["response_headers_to_remove"] == ["x-hide"]
    assert (action["timeout"], action["max_grpc_timeout"]) == ("1.5s", "1.5s")
    assert action["retry_policy"] == {
        "retry_on": "unavailable,retriable-status-codes",
        "retriable_status_codes": [503],
        "num_retries": 3,
        "per_try_timeout": "0.25s",
        "retry_back_off": {"base_interval": "0.01s"},
        "host_selection_retry_max_attempts": 5,
        "retry_priority": {
            "name": "envoy.retry_priorities.previous_priorities",
            "typed_config": {
                "@type": "type.googleapis.com/"
                "envoy.extensions.retry.priority.previous_priorities.v3.PreviousPrioritiesConfig",
                "update_frequency": 2,
            },
        },
    }
    assert action["hash_policy"] == [
        {"header": {"header_name": "x-session"}},
        {"cookie": {"name": "c", "path": "/", "ttl": "10s"}},
    ]
    assert action["request_mirror_policies"] == [
        {
            "cluster": f"outbound|50051|canary|{WORKERS}",
            "runtime_fraction": {"default_value": {"numerator": 25000, "denominator": "MILLION"}},
            "trace_sampled": False,
            "disable_shadow_host_suffix_append": True,
        }
    ]
    assert route["typed_per_filter_config"]["envoy.filters.http.fault"] == {
        "@type": "type.googleapis.com/envoy.extensions.filters.http.fault.v3.HTTPFault",
        "delay": {"percentage": {"numerator": 5000, "denominator": "MILLION"}, "fixed_delay": "1s"},
        "abort": {"percentage": {"numerator": 10000, "denominator": "MILLION"}, "grpc_status": 14},
    }


def test_a_weight_of_zero_is_left_out() -> None:
    """A canary at 0 has its cluster, but no share of the route."""
    base = load(Path(__file__).resolve().parents[3] / "istio" / "base")
    clusters = routes(f"{WORKERS}:50051", base)[-1]["route"]["weighted_clusters"]["clusters"]
    assert [(item["name"], item["weight"]) for item in clusters] == [(f"outbound|50051|v1|{WORKERS}", 100)]


def test_pools_and_ejection() -> None:
    """The fields of a DestinationRule, in Envoy's words."""
    found = cluster(f"outbound|50051||{WORKERS}")
    assert found["connect_timeout"] == "2s"
    assert found["circuit_breakers"]["thresholds"] == [
        {
            "max_connections": 10,
            "max_pending_requests": 11,
            "max_requests": 12,
            "max_retries": 14,
            "track_remaining": False,
            "retry_budget": {"budget_percent": {"value": 25}, "min_retry_concurrency": 5},
        }
    ]
    assert found["outlier_detection"] == {
        "enforcing_success_rate": 0,
        "consecutive_5xx": 5,
        "enforcing_consecutive_5xx": 100,
        "consecutive_gateway_failure": 3,
        "enforcing_consecutive_gateway_failure": 100,
        "split_external_local_origin_errors": True,
        "consecutive_local_origin_failure": 2,
        "enforcing_consecutive_local_origin_failure": 100,
        "enforcing_local_origin_success_rate": 0,
        "interval": "1s",
        "base_ejection_time": "30s",
        "max_ejection_percent": 100,
    }
    assert found["common_lb_config"] == {"healthy_panic_threshold": {"value": 10}}
    assert found["upstream_connection_options"] == {
        "tcp_keepalive": {"keepalive_probes": 3, "keepalive_time": 60, "keepalive_interval": 10},
    }
    options = next(iter(found["typed_extension_protocol_options"].values()))
    assert options["common_http_protocol_options"] == {
        "idle_timeout": "90s",
        "max_connection_duration": "3600s",
        "max_requests_per_connection": 13,
    }
    assert options["explicit_http_config"] == {"http2_protocol_options": {"max_concurrent_streams": 15}}


def test_a_ports_settings_replace_everything_above_them() -> None:
    """The canary's port sets a hash only: pool and ejection of rule and subset do not reach that port."""
    found = cluster(f"outbound|50051|canary|{WORKERS}")
    assert found["load_balancing_policy"]["policies"][0]["typed_extension_config"]["typed_config"][
        "fallback_policy"
    ] == {
        "policies": [
            {
                "typed_extension_config": {
                    "name": "envoy.load_balancing_policies.maglev",
                    "typed_config": {
                        "@type": "type.googleapis.com/envoy.extensions.load_balancing_policies.maglev.v3.Maglev",
                        "table_size": 65537,
                    },
                }
            }
        ],
    }
    assert found["connect_timeout"] == "10s"
    assert "outlier_detection" not in found
    # Istio's port level has no retry budget, so the rule's stays.
    assert found["circuit_breakers"]["thresholds"][0]["retry_budget"]["min_retry_concurrency"] == 5
    subset = cluster(f"outbound|50051|v1|{WORKERS}")
    assert subset["connect_timeout"] == "2s"  # a subset's own block replaces that block only


def test_a_picked_host_takes_the_pickers_choice_first() -> None:
    """Every cluster of an InferencePool's service: metadata, then header, then the rule's own balancing."""
    found = cluster(f"outbound|50051||{WORKERS}")
    assert found["lb_policy"] == "CLUSTER_PROVIDED"
    key = "x-gateway-destination-endpoint"
    config = found["load_balancing_policy"]["policies"][0]["typed_extension_config"]["typed_config"]
    assert config["override_host_sources"] == [
        {"metadata": {"key": "envoy.lb", "path": [{"key": key}]}},
        {"header": key},
    ]
    assert config["selected_host_key"] == {"key": "envoy.lb", "path": [{"key": key + "-served"}]}
    fallback = config["fallback_policy"]["policies"][0]["typed_extension_config"]
    assert fallback["name"] == "envoy.load_balancing_policies.round_robin"
    assert fallback["typed_config"]["slow_start_config"] == {
        "slow_start_window": "10s",
        "aggression": {"default_value": 2, "runtime_key": "("},
        "min_weight_percent": {"value": 20},
    }


@pytest.mark.parametrize(
    ("dialect", "body", "trailers"),
    [
        ("resilient", "NONE", "SKIP"),
        ("istio", "FULL_DUPLEX_STREAMED", "SEND"),
    ],
)
def test_routes_to_a_picked_host_ask_the_picker(dialect: Any, body: str, trailers: str) -> None:
    """Each weighted cluster tells the picker its subset's labels; responses never pass through the picker."""
    node = replace(NODE, picker_dialect=dialect)
    route = routes(f"{WORKERS}:50051", node=node)[0]
    overrides = [
        item["typed_per_filter_config"]["envoy.filters.http.ext_proc"]["overrides"]
        for item in route["route"]["weighted_clusters"]["clusters"]
    ]
    assert [item["grpc_initial_metadata"] for item in overrides] == [
        [{"key": "x-autoglm-subset-labels", "value": "version=v1"}],
        [{"key": "x-autoglm-subset-labels", "value": "version=canary"}],
    ]
    assert overrides[0]["processing_mode"] == {
        "request_header_mode": "SEND",
        "request_body_mode": body,
        "request_trailer_mode": trailers,
        "response_header_mode": "SEND",
        "response_body_mode": "NONE",
        "response_trailer_mode": "SKIP",
    }
    assert overrides[0]["failure_mode_allow"] is False  # FailClose in this policy
    assert overrides[0]["grpc_service"] == {
        "envoy_grpc": {
            "cluster_name": "outbound|50051||scheduler.autoglm.svc.cluster.local",
            "authority": "scheduler.autoglm.svc.cluster.local:50051",
        },
    }
    filters = translate(EVERYTHING, registry(), node).listeners[0]["filter_chains"][0]["filters"][0]["typed_config"][
        "http_filters"
    ]
    assert filters[0]["typed_config"]["allow_mode_override"] is (dialect == "resilient")
    assert filters[0]["typed_config"]["message_timeout"] == "1s"


def test_distance_orders_places_only_with_ejection() -> None:
    """Without outlier detection Istio has no failover: all places are equal. With it, nearer ones come first."""
    near = replace(NODE, locality="aws/eu/a")
    snapshot = translate(EVERYTHING, registry(), near)
    group = next(item for item in snapshot.endpoints if item["cluster_name"] == f"outbound|50051||{WORKERS}")
    assert [(place["locality"]["region"], place["priority"]) for place in group["endpoints"]] == [
        ("aws", 0),
        ("aws", 1),
        ("aws", 2),
        ("gcp", 3),
    ]
    subset = next(item for item in snapshot.endpoints if item["cluster_name"] == f"outbound|50051|v1|{WORKERS}")
    assert [place["priority"] for place in subset["endpoints"]] == [
        0,
        1,
        2,
    ]  # the canary's place is gone, ranks close up
    plain = translate(Policy(), registry(), near)
    assert {place["priority"] for group in plain.endpoints for place in group["endpoints"]} == {0}


def test_service_entries_become_clusters() -> None:
    """STATIC entries are endpoints of ours to write, DNS entries are resolved by Envoy."""
    snapshot = translate(EVERYTHING, registry(), NODE)
    group = next(item for item in snapshot.endpoints if item["cluster_name"] == "outbound|443||models.clouds.example")
    hosts = [
        (
            host["endpoint"]["address"]["socket_address"]["address"],
            host["endpoint"]["address"]["socket_address"]["port_value"],
            host["load_balancing_weight"],
        )
        for place in group["endpoints"]
        for host in place["lb_endpoints"]
    ]
    assert hosts == [("10.0.0.1", 9000, 3), ("10.0.0.2", 8443, 1)]
    dns = cluster("outbound|80||models.other.example")
    assert (dns["type"], dns["dns_refresh_rate"], dns["respect_dns_ttl"]) == ("STRICT_DNS", "60s", True)


def test_streams_have_no_idle_limit_and_listeners_have_bounds() -> None:
    """Istio's HCM timeouts, bounds on headers, streams and connections, spans named by listener."""
    snapshot = translate(EVERYTHING, registry(), replace(NODE, otlp_endpoint="127.0.0.1:4317"))
    by_name = {item["name"]: item["filter_chains"][0]["filters"][0]["typed_config"] for item in snapshot.listeners}
    assert set(by_name) == {"outbound", "ingress"}
    for name, service in (("outbound", "envoy-mesh"), ("ingress", "envoy-ingress")):
        manager = by_name[name]
        assert manager["stream_idle_timeout"] == "0s"
        assert manager["codec_type"] == "AUTO"
        assert manager["http2_protocol_options"] == {"max_concurrent_streams": 1024}
        assert manager["tracing"]["random_sampling"] == {"value": 12.5}
        assert manager["tracing"]["spawn_upstream_span"] is True
        assert manager["tracing"]["provider"]["typed_config"]["service_name"] == service
    layer = snapshot.bootstrap["layered_runtime"]["layers"][0]["static_layer"]
    assert layer["envoy.resource_limits.listener.ingress.connection_limit"] == 4096
    assert layer["tracing.opentelemetry.flush_interval_ms"] == 200
    assert (
        "tracing"
        not in translate(EVERYTHING, registry(), NODE).listeners[0]["filter_chains"][0]["filters"][0]["typed_config"]
    )


def test_equal_input_gives_equal_bytes() -> None:
    """The order of services and labels in memory does not show; the version is that of the content."""
    forward = registry()
    backward = Registry(tuple(reversed(forward.services)))
    first, second = (translate(EVERYTHING, item, NODE) for item in (forward, backward))
    assert first.files() == second.files()
    assert first.version == second.version
    assert first.version != translate(Policy(), forward, NODE).version
    assert all(json.loads(content) for content in first.files().values())


def test_a_weight_changes_routes_only_and_an_endpoint_its_file_only() -> None:
    """Edits that happen every day touch neither clusters nor listeners, so they cut no stream."""
    base = load(Path(__file__).resolve().parents[3] / "istio" / "base")
    before = translate(base, registry(), NODE)
    more = Registry(
        tuple(
            replace(
                item, endpoints={"grpc": (*item.endpoints["grpc"], Endpoint("127.0.0.1", 9999, {"version": "canary"}))}
            )
            if item.name == "sparse-inference"
            else item
            for item in registry().services
        )
    )
    steps = translate(base, more, NODE).steps_from(before)
    assert [sorted(step.files) for step in steps] == [
        [
            f"eds/outbound_.50051_._.{WORKERS}.json",
            f"eds/outbound_.50051_.canary_.{WORKERS}.json",
        ]
    ]
    assert before.steps_from(before) == ()
    assert [kind for step in before.steps_from(None) for kind in step.files][-1] == "lds/lds.json"


def ingress(policy: Policy = EVERYTHING) -> list[dict[str, Any]]:
    """The routes of the door."""
    found: list[dict[str, Any]] = translate(policy, registry(), NODE).routes[1]["virtual_hosts"][0]["routes"]
    return found


def test_a_route_says_which_object_it_comes_from() -> None:
    """Istio's name for the VirtualService, as in a cluster's own dump, and the place within it."""
    assert [route["metadata"]["filter_metadata"] for route in routes(f"{WORKERS}:50051")] == [
        {
            "istio": {"config": "/apis/networking.istio.io/v1/namespaces/autoglm/virtual-service/workers"},
            "autoglm": {"path": path},
        }
        for path in ("spec.http[0].match[0]", "spec.http[0].match[1]", "spec.http[1]")
    ]
    assert cluster(f"outbound|50051|v1|{WORKERS}")["metadata"]["filter_metadata"]["istio"] == {
        "config": "/apis/networking.istio.io/v1/namespaces/autoglm/destination-rule/workers",
        "services": [{"host": WORKERS}],
        "subset": "v1",
    }


def test_a_route_may_answer_by_itself() -> None:
    """Redirects are 301 and leave out the scheme's own port; a direct answer has its body in the route."""
    _, rewritten, moved, here, direct = ingress()
    assert rewritten["route"]["regex_rewrite"] == {"pattern": {"regex": "^/v0/([a-z]+)"}, "substitution": "/v1/\\1"}
    assert moved["redirect"] == {
        "host_redirect": "models.example",
        "path_redirect": "/new",
        "port_redirect": 8443,
        "response_code": "PERMANENT_REDIRECT",
        "scheme_redirect": "https",
    }
    assert here["redirect"] == {"path_redirect": "/there", "response_code": "MOVED_PERMANENTLY"}
    assert direct["direct_response"] == {"status": 200, "body": {"inline_string": "User-agent: *"}}
    assert direct["response_headers_to_add"][0]["header"] == {"key": "content-type", "value": "text/plain"}
    assert not {"route"} & (moved.keys() | here.keys() | direct.keys())


def test_cors_is_the_routes_and_its_filter_every_listeners() -> None:
    """Istio's mapping: always enabled, preflights of strangers forwarded unless IGNORE, age in whole seconds."""
    assert ingress()[0]["typed_per_filter_config"]["envoy.filters.http.cors"] == {
        "@type": "type.googleapis.com/envoy.extensions.filters.http.cors.v3.CorsPolicy",
        "allow_origin_string_match": [
            {"exact": "https://app.example"},
            {"prefix": "https://dev."},
            {"safe_regex": {"regex": "https://.*[.]example"}},
        ],
        "filter_enabled": {"default_value": {"numerator": 100, "denominator": "HUNDRED"}},
        "forward_not_matching_preflights": False,
        "allow_methods": "GET,POST",
        "allow_headers": "authorization,content-type",
        "expose_headers": "x-request-id",
        "max_age": "86400",
        "allow_credentials": True,
    }
    silent = _edited(
        ingress_routes=[{"route": [{"destination": {"host": "gateway", "port": {"number": 8000}}}], "corsPolicy": {}}]
    )
    assert ingress(silent)[0]["typed_per_filter_config"]["envoy.filters.http.cors"] == {
        "@type": "type.googleapis.com/envoy.extensions.filters.http.cors.v3.CorsPolicy",
        "allow_origin_string_match": [],
        "filter_enabled": {"default_value": {"numerator": 100, "denominator": "HUNDRED"}},
        "forward_not_matching_preflights": True,
    }


def _edited(ingress_routes: list[dict[str, Any]]) -> Policy:
    """The sample with other routes at the door."""
    changed = []
    for service in EVERYTHING.virtual_services:
        data = service.model_dump(mode="json", by_alias=True, exclude_unset=True)
        if service.metadata.name == "ingress":
            data["spec"]["http"] = ingress_routes
        changed.append(type(service).model_validate_json(json.dumps(data)))
    return replace(EVERYTHING, virtual_services=tuple(changed))


def filters(policy: Policy) -> dict[str, list[str]]:
    """The names of the HTTP filters of each listener, in order."""
    return {
        item["name"]: [
            part["name"].removeprefix("envoy.filters.http.")
            for part in item["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"]
        ]
        for item in translate(policy, registry(), NODE).listeners
    }


def test_the_door_translates_and_compresses_only_where_the_policy_says_so() -> None:
    """GRPC-WEB on the Gateway's port adds its filter, an EnvoyFilter its compressors; a plain door has neither."""
    plain = ["grpc_stats", "fault", "cors", "router"]
    found = filters(EVERYTHING)
    # Who it is and what is allowed come first, so that nothing is done for those who are refused.
    guards = ["jwt_authn", "rbac"]
    edge = ["grpc_web", "compressor", "compressor"]
    assert found["ingress"] == [*guards, *edge, *plain[:-1], "local_ratelimit", "router"]
    assert found["outbound"] == ["ext_proc", *plain]
    bare = load(Path(__file__).resolve().parents[3] / "istio" / "base")
    data = bare.gateways[0].model_dump(mode="json", by_alias=True)
    data["spec"]["servers"][0]["port"]["protocol"] = "HTTP"
    gateway = type(bare.gateways[0]).model_validate_json(json.dumps(data))
    assert filters(replace(bare, gateways=(gateway,)))["ingress"] == ["rbac", *plain]


def test_a_compressor_is_passed_on_as_written() -> None:
    """What Istio would patch into Envoy and what we put there are the same bytes."""
    written = EVERYTHING.envoy_filters[0].spec.config_patches[1].patch.value
    listener = next(item for item in translate(EVERYTHING, registry(), NODE).listeners if item["name"] == "ingress")
    found = listener["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"][4]
    assert found == {
        "name": written.name,
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.compressor.v3.Compressor",
            "compressor_library": {
                "name": "gzip",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.compression.gzip.compressor.v3.Gzip",
                    "compression_level": "BEST_SPEED",
                    "memory_level": 5,
                    "window_bits": 12,
                },
            },
            "response_direction_config": {
                "common_config": {"min_content_length": 1024, "content_type": ["application/json"]}
            },
        },
    }
    elsewhere = EVERYTHING.envoy_filters[0].model_dump(mode="json", by_alias=True, exclude_none=True)
    elsewhere["spec"]["workloadSelector"]["labels"] = {"istio": "other"}
    other = type(EVERYTHING.envoy_filters[0]).model_validate_json(json.dumps(elsewhere))
    assert "compressor" not in filters(replace(EVERYTHING, envoy_filters=(other,)))["ingress"]


def test_with_weights_a_retry_leaves_its_host_even_where_a_hash_balances() -> None:
    """Istio looks at the hash of a single destination only."""
    one = {"destination": {"host": "cache"}}
    hashed = _edited(ingress_routes=[{"route": [one]}])
    assert "retry_host_predicate" not in ingress(hashed)[0]["route"]["retry_policy"]
    two = [{**one, "weight": 50}, {"destination": {"host": "tokenizer"}, "weight": 50}]
    split = ingress(_edited(ingress_routes=[{"route": two}]))[0]["route"]
    assert split["retry_policy"]["retry_host_predicate"] == [PREVIOUS_HOSTS]
    assert len(split["hash_policy"]) == 2


def test_unset_fields_of_ejection_and_balancing_stay_envoys() -> None:
    """Only what is written is told: intervals and thresholds are Envoy's, warm-up has Istio's 10 % and even rise."""
    text = {
        "apiVersion": "networking.istio.io/v1",
        "kind": "DestinationRule",
        "metadata": {"name": "cache", "namespace": "autoglm"},
        "spec": {
            "host": "cache",
            "trafficPolicy": {
                "outlierDetection": {},
                "loadBalancer": {"warmup": {"duration": "30s"}},
                "connectionPool": {"tcp": {}, "http": {}},
                "retryBudget": {},
            },
        },
    }
    rule = type(EVERYTHING.destination_rules[0]).model_validate_json(json.dumps(text))
    found = cluster("outbound|50051||cache.autoglm.svc.cluster.local", Policy(destination_rules=(rule,)))
    assert found["outlier_detection"] == {"enforcing_success_rate": 0}
    assert found["common_lb_config"] == {"healthy_panic_threshold": {"value": 0}}
    assert found["lb_policy"] == "LEAST_REQUEST"
    assert found["least_request_lb_config"] == {
        "slow_start_config": {
            "slow_start_window": "30s",
            "aggression": {"default_value": 1, "runtime_key": "("},
            "min_weight_percent": {"value": 10},
        }
    }
    thresholds = found["circuit_breakers"]["thresholds"][0]
    assert thresholds["retry_budget"] == {"budget_percent": {"value": 20}, "min_retry_concurrency": 3}
    assert {
        thresholds[name] for name in ("max_connections", "max_pending_requests", "max_requests", "max_retries")
    } == {UNLIMITED}
    assert found["connect_timeout"] == "10s"


def test_a_rule_may_name_server_and_accounts_for_mutual_tls() -> None:
    """Absent they are Istio's: the name that says port, subset and host, and the service's own account."""
    own = {"mode": "ISTIO_MUTUAL", "sni": "inner.example", "subjectAltNames": ["spiffe://cluster.local/ns/a/sa/b"]}
    for fields, server, account in (
        (own, "inner.example", "spiffe://cluster.local/ns/a/sa/b"),
        ({"mode": "ISTIO_MUTUAL"}, "outbound_.50051_._.cache", "spiffe://cluster.local/ns/autoglm/sa/cache"),
    ):
        rule = ClientTls.model_validate_json(json.dumps(fields))
        accepted = ("spiffe://cluster.local/ns/autoglm/sa/cache",)
        sides = client_side(rule, Path("/ids"), "gateway", accepted, "outbound_.50051_._.cache", is_h2=True)
        context = sides["transport_socket"]["typed_config"]
        assert context["sni"] == server
        assert account in json.dumps(context["common_tls_context"])
