"""Locality load balancing, pinned: which places are asked first, how much each gets, and at which address."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from services.mesh.policy.destination_rule import LocalityLb, TrafficPolicy
from services.mesh.registry import Endpoint
from services.mesh.translate import NodeSettings
from services.mesh.translate.endpoints import load_assignment
from services.mesh.translate.localities import is_weighted, matches
from services.mesh.translate.world import Member

HERE = "aws-eu/a/1"
OUTLIERS = {"outlierDetection": {"maxEjectionPercent": 100}}
PLACES = ("aws-eu/a/1", "aws-eu/a/2", "aws-eu/b/1", "aws-us/a/1", "gcp-eu/a/1")


def traffic_policy(content: dict[str, Any]) -> TrafficPolicy:
    """As read from a file."""
    return TrafficPolicy.model_validate_json(json.dumps(content))


def assignment(
    setting: dict[str, Any] | None,
    places: tuple[str, ...] = PLACES,
    *,
    detects: bool = True,
    node: NodeSettings | None = None,
    **endpoint: Any,
) -> list[dict[str, Any]]:
    """The groups Envoy gets for one endpoint in each of `places`, numbered from port 1."""
    balancer = {} if setting is None else {"loadBalancer": {"localityLbSetting": setting}}
    traffic = traffic_policy({**balancer, **(OUTLIERS if detects else {})})
    members = tuple(Member(Endpoint("10.0.0.1", n + 1, locality=place, **endpoint)) for n, place in enumerate(places))
    node = node or NodeSettings(Path("/run/mesh"), locality=HERE)
    groups: list[dict[str, Any]] = load_assignment("c", members, traffic, node)["endpoints"]
    return groups


def priorities(groups: list[dict[str, Any]]) -> dict[str, int]:
    """The priority by place."""
    return {"/".join(group["locality"].values()): group["priority"] for group in groups}


def weights(groups: list[dict[str, Any]]) -> dict[str, int]:
    """The weight by place."""
    return {"/".join(group["locality"].values()): group["load_balancing_weight"] for group in groups}


def test_distance_orders_places_once_ejection_can_tell_that_one_is_gone() -> None:
    """Same subzone, zone, region, elsewhere: 0 to 3. Without outlier detection all are equal."""
    assert priorities(assignment(None)) == dict(zip(PLACES, (0, 1, 2, 3, 3), strict=True))
    assert set(priorities(assignment(None, detects=False)).values()) == {0}
    assert set(priorities(assignment({"failover": [{"from": "aws-eu", "to": "gcp-eu"}]}, detects=False)).values()) == {
        0
    }


def test_disabled_locality_balancing_orders_nothing() -> None:
    """`enabled: false` leaves all places equal."""
    assert set(priorities(assignment({"enabled": False})).values()) == {0}


def test_failover_names_the_region_that_takes_over() -> None:
    """The named region comes before the others; a rule for another region changes nothing; gaps are closed."""
    named = {"failover": [{"from": "aws-eu", "to": "gcp-eu"}, {"from": "gcp-eu", "to": "aws-us"}]}
    assert priorities(assignment(named)) == dict(zip(PLACES, (0, 1, 2, 4, 3), strict=True))
    assert priorities(assignment(named, PLACES[3:])) == {"aws-us/a/1": 1, "gcp-eu/a/1": 0}
    other = {"failover": [{"from": "gcp-eu", "to": "aws-us"}]}
    assert priorities(assignment(other)) == dict(zip(PLACES, (0, 1, 2, 3, 3), strict=True))


def test_failover_priority_counts_the_labels_that_match_in_order() -> None:
    """All labels: 0; the first missing one decides. A group is split where its endpoints differ."""
    traffic = traffic_policy(
        {"loadBalancer": {"localityLbSetting": {"failoverPriority": ["network", "version=v1"]}}, **OUTLIERS}
    )
    node = NodeSettings(Path("/run/mesh"), locality=HERE, labels={"network": "n1", "version": "canary"})
    labels = ({"network": "n1", "version": "v1"}, {"network": "n1"}, {"network": "n2", "version": "v1"})
    members = tuple(Member(Endpoint("10.0.0.1", n + 1, label, HERE)) for n, label in enumerate(labels))
    groups = load_assignment("c", members, traffic, node)["endpoints"]
    ports = [group["lb_endpoints"][0]["endpoint"]["address"]["socket_address"]["port_value"] for group in groups]
    assert [(port, group["priority"]) for port, group in zip(ports, groups, strict=True)] == [(1, 0), (2, 1), (3, 2)]


def test_distribute_gives_weights_and_drops_what_it_does_not_name() -> None:
    """A weight for several places is divided among them, rounded up; there are no priorities."""
    setting = {"distribute": [{"from": "aws-eu/a/*", "to": {"aws-eu/*": 80, "gcp-eu": 20}}]}
    groups = assignment(setting, detects=False)
    assert weights(groups) == {"aws-eu/a/1": 27, "aws-eu/a/2": 27, "aws-eu/b/1": 27, "gcp-eu/a/1": 20}
    assert set(priorities(groups).values()) == {0}


def test_the_first_rule_for_our_place_counts() -> None:
    """Later rules that match as well are not heard; with no rule for our place nothing changes."""
    first = {"from": "aws-eu/*", "to": {"gcp-eu": 100}}
    second = {"from": "aws-eu/a/1", "to": {"aws-us": 100}}
    assert list(weights(assignment({"distribute": [first, second]}))) == ["gcp-eu/a/1"]
    assert len(assignment({"distribute": [{"from": "azure", "to": {"gcp-eu": 100}}]})) == len(PLACES)


def test_a_place_that_came_back_gets_its_share_little_by_little() -> None:
    """At a ramp of 0.25 a share of 20 beside 80 becomes 5 beside 80."""
    setting = {"distribute": [{"from": "*", "to": {"aws-eu": 80, "gcp-eu": 20}}]}
    traffic = traffic_policy({"loadBalancer": {"localityLbSetting": setting}})
    members = (
        Member(Endpoint("10.0.0.1", 1, locality=HERE)),
        Member(Endpoint("10.0.0.2", 1, locality="gcp-eu/a/1", ramp=0.25)),
    )
    groups = load_assignment("c", members, traffic, NodeSettings(Path("/r"), locality=HERE))["endpoints"]
    assert weights(groups) == {HERE: 8000, "gcp-eu/a/1": 500}


def test_an_endpoint_of_another_network_is_reached_through_its_gateway() -> None:
    """Its address is replaced, its weight stays; several make one address. Without gateway or sidecar it is gone."""
    node = NodeSettings(
        Path("/run/mesh"), locality=HERE, network="aws", network_gateways={"gcp": (("192.0.2.1", 15443),)}
    )
    members = (
        Member(Endpoint("10.0.0.1", 1, locality=HERE, network="aws")),
        Member(Endpoint("10.0.0.2", 1, locality="gcp-eu/a/1", network="gcp", has_sidecar=True)),
        Member(Endpoint("10.0.0.3", 1, locality="gcp-eu/a/1", network="gcp", has_sidecar=True)),
        Member(Endpoint("10.0.0.4", 1, locality="gcp-eu/b/1", network="gcp")),
        Member(Endpoint("10.0.0.5", 1, locality="azure-eu/a/1", network="azure", has_sidecar=True)),
    )
    groups = load_assignment("c", members, traffic_policy(OUTLIERS), node)["endpoints"]
    assert [(group["priority"], group["lb_endpoints"]) for group in groups] == [
        (
            0,
            [
                {
                    "endpoint": {"address": {"socket_address": {"address": "10.0.0.1", "port_value": 1}}},
                    "load_balancing_weight": 1,
                }
            ],
        ),
        (
            1,
            [
                {
                    "endpoint": {"address": {"socket_address": {"address": "192.0.2.1", "port_value": 15443}}},
                    "load_balancing_weight": 2,
                    "metadata": {"filter_metadata": {"envoy.transport_socket_match": {"tlsMode": "istio"}}},
                }
            ],
        ),
    ]


@pytest.mark.parametrize(
    "setting",
    [
        {"distribute": [{"from": "a", "to": {"a": 50, "b": 40}}]},
        {"distribute": [{"from": "a", "to": {"a": 100, "b": 0}}]},
        {"failover": [{"from": "a", "to": "a"}]},
        {"distribute": [{"from": "a", "to": {"a": 100}}], "failover": [{"from": "a", "to": "b"}]},
    ],
)
def test_a_setting_that_istio_refuses_is_refused(setting: dict[str, Any]) -> None:
    """Weights that do not add up, a share of nothing, a region failing over to itself, two ways at once."""
    with pytest.raises(ValidationError):
        LocalityLb.model_validate_json(json.dumps(setting))


def test_envoy_heeds_the_weights_of_places_only_where_the_policy_gives_some() -> None:
    """`distribute` always; `failover` with outlier detection; plain distance never."""
    cases: list[tuple[dict[str, Any], bool]] = [
        ({"loadBalancer": {"localityLbSetting": {"distribute": [{"from": "*", "to": {"*": 100}}]}}}, True),
        ({"loadBalancer": {"localityLbSetting": {"failover": [{"from": "a", "to": "b"}]}}}, False),
        ({"loadBalancer": {"localityLbSetting": {"failover": [{"from": "a", "to": "b"}]}}, **OUTLIERS}, True),
        (OUTLIERS, False),
    ]
    assert [is_weighted(traffic_policy(policy)) for policy, _ in cases] == [want for _, want in cases]


def test_a_pattern_means_every_place_below_it() -> None:
    """Absent parts and stars stand for any; a named part must be equal."""
    assert all(matches(HERE, pattern) for pattern in ("*", "aws-eu", "aws-eu/*", "aws-eu/a", "aws-eu/*/1", HERE))
    assert not any(matches(HERE, pattern) for pattern in ("gcp-eu", "aws-eu/b", "aws-eu/a/2", "aws"))
