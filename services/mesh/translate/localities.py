"""Near before far: Istio's locality load balancing, as the order and the weights of groups of endpoints.

`distribute` gives weights to places; otherwise, and only where outlier detection can tell that a place is gone, places
get priorities by distance. Pure; knows neither addresses nor Envoy's messages. Follows Istio 1.30.3's
pilot/pkg/networking/core/loadbalancer.
"""

import math
from dataclasses import dataclass, replace

from services.mesh.policy.destination_rule import Distribute, Failover, LocalityLb, TrafficPolicy
from services.mesh.translate.names import locality
from services.mesh.translate.node import NodeSettings
from services.mesh.translate.world import Member

RAMP_STEPS = 100
"""Weights are whole numbers: while some place is ramping up, all are multiplied by this."""
_PARTS = ("region", "zone", "sub_zone")


@dataclass(frozen=True, slots=True)
class Group:
    """Endpoints of one place that are equally near."""

    place: str
    members: tuple[Member, ...]
    weight: int
    priority: int = 0


def groups(members: tuple[Member, ...], traffic: TrafficPolicy, node: NodeSettings) -> list[Group]:
    """All endpoints that may be used, in order of priority and place."""
    setting = traffic.load_balancer.locality_lb_setting if traffic.load_balancer is not None else None
    found = _by_place(members)
    if node.locality and setting is not None and setting.distribute:
        found = _distributed(found, setting.distribute, node.locality)
    elif node.locality and traffic.outlier_detection is not None and (setting is None or setting.enabled):
        found = _ordered(found, setting or LocalityLb(), node)
    return sorted(_ramped(found), key=lambda group: (group.priority, group.place))


def is_weighted(traffic: TrafficPolicy) -> bool:
    """Whether Envoy is to heed the weights of places, and not only those of endpoints."""
    setting = traffic.load_balancer.locality_lb_setting if traffic.load_balancer is not None else None
    if setting is None:
        return False
    orders = setting.enabled and traffic.outlier_detection is not None
    return bool(setting.distribute) or (orders and bool(setting.failover or setting.failover_priority))


def matches(place: str, pattern: str) -> bool:
    """Whether a place is meant by a pattern: absent parts and `*` stand for any."""
    there, wanted = locality(place), locality(pattern)
    if wanted.get("region") != "*" and there.get("region", "") != wanted.get("region", ""):
        return False
    return all(wanted.get(part, "") in ("", "*", there.get(part, "")) for part in _PARTS[1:])


def distance(theirs: str, ours: str) -> int:
    """0 same subzone, 1 same zone, 2 same region, 3 elsewhere."""
    there, here = locality(theirs), locality(ours)
    for number, part in enumerate(_PARTS):
        if there.get(part, "") != here.get(part, ""):
            return 3 - number
    return 0


def _by_place(members: tuple[Member, ...]) -> list[Group]:
    places = sorted({member.endpoint.locality for member in members})
    return [
        Group(place, here, sum(member.weight for member in here))
        for place in places
        if (here := tuple(member for member in members if member.endpoint.locality == place))
    ]


def _distributed(found: list[Group], rules: tuple[Distribute, ...], ours: str) -> list[Group]:
    """By the first rule for our place; groups that it does not name get nothing."""
    rule = next((rule for rule in rules if matches(ours, rule.from_)), None)
    if rule is None:
        return found
    kept: list[Group] = []
    left = list(found)
    for pattern, weight in rule.to.items():
        here = [group for group in left if matches(group.place, pattern)]
        left = [group for group in left if group not in here]
        total = sum(group.weight for group in here)
        kept += [replace(group, weight=math.ceil(group.weight * weight / total)) for group in here]
    return kept


def _ordered(found: list[Group], setting: LocalityLb, node: NodeSettings) -> list[Group]:
    ranked = [(group, 0) for group in found]
    if setting.failover_priority:
        ranked = [pair for group in found for pair in _by_labels(group, setting.failover_priority, node)]
    if setting.failover or not setting.failover_priority:
        ranked = [(group, 5 * rank + _far(group.place, setting.failover, node)) for group, rank in ranked]
    ranks = {rank: number for number, rank in enumerate(sorted({rank for _, rank in ranked}))}
    return [replace(group, priority=ranks[rank]) for group, rank in ranked]


def _far(place: str, rules: tuple[Failover, ...], node: NodeSettings) -> int:
    """The distance, and 4 for a region that the rule for ours does not name."""
    far = distance(place, node.locality)
    if far < 3:
        return far
    ours = locality(node.locality).get("region", "")
    rule = next((rule for rule in rules if rule.from_ == ours), None)
    return 3 if rule is None or locality(place).get("region", "") == rule.to else 4


def _by_labels(group: Group, wanted: tuple[str, ...], node: NodeSettings) -> list[tuple[Group, int]]:
    """The group split by how many of the labels, in order, an endpoint shares with this proxy."""
    split: dict[int, list[Member]] = {}
    for member in group.members:
        split.setdefault(_unlike(member, wanted, node), []).append(member)
    return [
        (Group(group.place, tuple(here), sum(member.weight for member in here)), rank)
        for rank, here in sorted(split.items())
    ]


def _unlike(member: Member, wanted: tuple[str, ...], node: NodeSettings) -> int:
    for number, text in enumerate(wanted):
        label, is_overridden, value = text.partition("=")
        ours = value if is_overridden else node.labels.get(label, "")
        if member.endpoint.labels.get(label, "") != ours:
            return len(wanted) - number
    return 0


def _ramped(found: list[Group]) -> list[Group]:
    """A cloud that has just come back gets its share little by little."""
    if all(member.endpoint.ramp >= 1 for group in found for member in group.members):
        return found
    return [replace(group, weight=max(1, round(group.weight * RAMP_STEPS * min(_ramps(group))))) for group in found]


def _ramps(group: Group) -> list[float]:
    return [member.endpoint.ramp for member in group.members]
