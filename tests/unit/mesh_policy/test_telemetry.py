"""Telemetry objects: how several of them join, and what Envoy is told."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.mesh.policy import Policy, PolicyError, check, load
from services.mesh.policy.telemetry import Telemetry, effective
from services.mesh.registry import Endpoint, Registry, Service, ServicePort
from services.mesh.translate import NodeSettings
from services.mesh.translate.telemetry import access_logs, grpc_stats, tracing

NODE = NodeSettings(Path("/run/mesh"), otlp_endpoint="127.0.0.1:4317")
DOOR = {"istio": "ingressgateway"}
GRPC = ServicePort("grpc", 50051, "grpc")
ONE = Registry(
    (Service("gateway", "autoglm", (GRPC,), {"grpc": (Endpoint("127.0.0.1", 1, {"app": "gateway"}),)}),),
)


def telemetry(spec: str, name: str = "t") -> Telemetry:
    head = {"apiVersion": "telemetry.istio.io/v1", "kind": "Telemetry", "metadata": {"name": name}}
    document = yaml.safe_load(spec)
    return Telemetry.model_validate_json(json.dumps(head | {"spec": document}))


def policy(*specs: str) -> Policy:
    return Policy(telemetries=tuple(telemetry(spec, f"t{number}") for number, spec in enumerate(specs)))


def kinds(logs: list[dict[str, Any]]) -> list[str]:
    return [log["name"].rpartition(".")[2] for log in logs]


def test_without_a_policy_spans_are_sampled_as_the_node_says_and_the_file_log_is_on() -> None:
    """Istio's default sampling; this machine's own access log; nothing goes to a collector unasked."""
    assert tracing(Policy(), NODE, "envoy-mesh", {})["tracing"]["random_sampling"] == {"value": 1.0}
    assert kinds(access_logs(Policy(), NODE, "outbound", {})) == ["file"]
    assert tracing(Policy(), replace(NODE, otlp_endpoint=""), "envoy-mesh", {}) == {}


def test_a_selector_goes_over_the_namespace_field_by_field() -> None:
    """The door keeps the namespace's tags and has its own sampling; others do not notice; order does not matter."""
    wide = "{tracing: [{randomSamplingPercentage: 10, customTags: {a: {literal: {value: b}}}}]}"
    door = "{selector: {matchLabels: {istio: ingressgateway}}, tracing: [{randomSamplingPercentage: 50}]}"
    for specs in ((wide, door), (door, wide)):
        both = policy(*specs)
        at_the_door = tracing(both, NODE, "envoy-ingress", DOOR)["tracing"]
        assert at_the_door["random_sampling"] == {"value": 50}
        assert at_the_door["custom_tags"] == [{"tag": "a", "literal": {"value": "b"}}]
        assert tracing(both, NODE, "envoy-mesh", {})["tracing"]["random_sampling"] == {"value": 10}


def test_span_reporting_can_be_switched_off_for_one_workload() -> None:
    """No tracing block there; the other listeners keep theirs."""
    off = policy("{selector: {matchLabels: {istio: ingressgateway}}, tracing: [{disableSpanReporting: true}]}")
    assert tracing(off, NODE, "envoy-ingress", DOOR) == {}
    assert tracing(off, NODE, "envoy-mesh", {})


def test_every_kind_of_custom_tag_reaches_envoy() -> None:
    """Literal, header, environment and format string, each in Envoy's own form."""
    tags = policy(
        "{tracing: [{customTags: {a: {literal: {value: x}}, b: {header: {name: X-Y, defaultValue: z}}, "
        "c: {environment: {name: HOME}}, d: {formatter: {value: '%PROTOCOL%'}}}}]}"
    )
    assert tracing(tags, NODE, "s", {})["tracing"]["custom_tags"] == [
        {"tag": "a", "literal": {"value": "x"}},
        {"tag": "b", "request_header": {"name": "x-y", "default_value": "z"}},
        {"tag": "c", "environment": {"name": "HOME"}},
        {"tag": "d", "value": "%PROTOCOL%"},
    ]


def test_access_logs_go_where_the_policy_says() -> None:
    """`otel` adds a logger in the request's trace, with its filter; `envoy` is the file and can be switched off."""
    both = policy("{accessLogging: [{providers: [{name: otel}], filter: {expression: response.code >= 400}}]}")
    file, otel = access_logs(both, NODE, "outbound", {})
    assert "filter" not in file
    assert otel["filter"]["extension_filter"]["typed_config"]["expression"] == "response.code >= 400"
    names = [item["key"] for item in otel["typed_config"]["attributes"]["values"]]
    assert {"request_id", "grpc_status", "flags", "cluster"} <= set(names)
    assert kinds(access_logs(both, replace(NODE, otlp_endpoint=""), "outbound", {})) == ["file"]
    assert access_logs(policy("{accessLogging: [{disabled: true}]}"), NODE, "outbound", {}) == []
    only = "{accessLogging: [{providers: [{name: envoy}], disabled: true}, {providers: [{name: otel}]}]}"
    assert kinds(access_logs(policy(only), NODE, "outbound", {})) == ["open_telemetry"]


def test_statuses_are_counted_by_method_for_our_own_services_only() -> None:
    """The list is closed, so a stranger cannot invent time series by calling methods that do not exist."""
    config = grpc_stats()["typed_config"]
    assert "stats_for_all_methods" not in config
    counted = {item["name"]: item["method_names"] for item in config["individual_method_stats_allowlist"]["services"]}
    assert "Generate" in counted["autoglm.gateway.v1.GatewayService"]
    assert {name.split(".")[1] for name in counted} == {
        "cache",
        "gateway",
        "scheduler",
        "sparse_inference",
        "tokenizer",
    }


def test_two_objects_for_the_same_workloads_are_refused_and_a_selector_of_nobody_is_told() -> None:
    """Istio would take the older one, which files do not tell; a typing mistake in a label would switch nothing."""
    twice = policy("{tracing: [{randomSamplingPercentage: 1}]}", "{tracing: [{randomSamplingPercentage: 2}]}")
    (problem,) = check(twice, ONE)
    assert problem.severity == "error" and "the same workloads" in problem.message
    for label, count in (("gateway", 0), ("gatewya", 1)):
        selecting = policy(
            f"{{selector: {{matchLabels: {{app: {label}}}}}, tracing: [{{disableSpanReporting: true}}]}}"
        )
        found = check(selecting, ONE)
        assert [item.severity for item in found] == ["warning"] * count
        assert len(effective(selecting.telemetries, {"app": label}).tracing.model_fields_set) > 0


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{metrics: []}", "Istio 1.30.3 has it"),
        ("{tracing: [{match: {mode: CLIENT}}]}", "spec.tracing[0].match: not supported"),
        ("{tracing: [{providers: [{name: zipkin}]}]}", "spec.tracing[0].providers[0].name"),
        ("{accessLogging: [{providers: [{name: stackdriver}]}]}", "spec.accessLogging[0].providers[0].name"),
        ("{accessLogging: [{filter: {}}]}", "spec.accessLogging[0].filter.expression: required"),
        ("{selector: {matchLabels: {a: b}}}", "says neither tracing nor accessLogging"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_its_path(tmp_path: Path, spec: str, message: str) -> None:
    """Providers that are not here, parts of Istio that a stock Envoy lacks, and objects that say nothing."""
    head = "apiVersion: telemetry.istio.io/v1\nkind: Telemetry\nmetadata: {name: t, namespace: autoglm}\n"
    (tmp_path / "t.yaml").write_text(f"{head}spec: {spec}\n")
    with pytest.raises(PolicyError) as caught:
        load(tmp_path)
    assert any(message in str(problem) for problem in caught.value.problems), caught.value.problems
