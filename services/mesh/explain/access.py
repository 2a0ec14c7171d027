"""Whether the called service's own proxy would let the request in, by the RBAC rules of its inbound listener.

Three-valued: yes, no, or "depends" where a rule asks about something a request alone does not show, such as a token.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Literal

from services.mesh.explain.request import OUTSIDE, Request
from services.mesh.policy import Policy
from services.mesh.translate import Snapshot
from services.mesh.translate.names import Json

RBAC = "envoy.filters.http.rbac"
TRUST_DOMAIN = "cluster.local"
DOOR = "ingress"
_POLICY = re.compile(r"ns\[(?P<namespace>[^]]+)\]-policy\[(?P<name>[^]]+)\]-rule\[(?P<rule>\d+)\]")
Verdict = Literal["allowed", "denied", "depends", "unchecked"]


@dataclass(frozen=True, slots=True)
class Ruling:
    """`unchecked`: nothing stands in front of the service, or nobody runs there yet."""

    verdict: Verdict
    why: str


def judge(snapshot: Snapshot, policy: Policy, endpoints: Sequence[Json], request: Request) -> Ruling:
    """The ruling of the listener in front of the first endpoint that has one here."""
    ports = {
        item["endpoint"]["address"]["socket_address"]["port_value"]
        for group in endpoints
        for item in group["lb_endpoints"]
    }
    for listener in snapshot.listeners:
        port = listener.get("address", {}).get("socket_address", {}).get("port_value")
        if port in ports and listener["name"] != DOOR:
            filters = [item for item in _http_filters(listener) if item["name"].startswith(RBAC)]
            return _ruling(filters, policy, request, port)
    return Ruling("unchecked", "no proxy of this mesh stands in front of an endpoint")


def principal(request: Request, namespace: str = "autoglm") -> str:
    """Whose certificate the service sees: the caller's, and the door's own for whoever comes from outside."""
    account = DOOR if request.caller == OUTSIDE else request.caller
    return f"spiffe://{TRUST_DOMAIN}/ns/{namespace}/sa/{account}"


def _http_filters(listener: Json) -> list[Json]:
    for chain in reversed(listener["filter_chains"]):
        for network in chain["filters"]:
            if "http_filters" in network["typed_config"]:
                found: list[Json] = network["typed_config"]["http_filters"]
                return found
    return []


def _ruling(filters: Sequence[Json], policy: Policy, request: Request, port: int) -> Ruling:
    if not filters:
        return Ruling("allowed", "no AuthorizationPolicy speaks of this service")
    last = Ruling("allowed", "no rule denies it")
    for item in filters:
        rules = item["typed_config"].get("rules")
        if rules is None or rules.get("action") == "LOG":
            continue
        denies = rules.get("action") == "DENY"
        hits = {name: _policy_holds(body, request, port) for name, body in rules.get("policies", {}).items()}
        sure = [name for name, holds in hits.items() if holds]
        open_ = [name for name, holds in hits.items() if holds is None]
        if denies and sure:
            return Ruling("denied", f"by {_said(sure[0], policy)}")
        if denies and open_:
            last = Ruling("depends", f"{_said(open_[0], policy)} denies it, if the rest of its conditions hold")
        if not denies and sure:
            last = last if last.verdict == "depends" else Ruling("allowed", f"by {_said(sure[0], policy)}")
        elif not denies and open_:
            last = Ruling("depends", f"{_said(open_[0], policy)} allows it, if the rest of its conditions hold")
        elif not denies:
            names = ", ".join(sorted({_said(name, policy).rpartition(":")[0] for name in hits}))
            return Ruling("denied", f"no rule allows {principal(request)} this method ({names or 'no rules at all'})")
    return last


def _said(name: str, policy: Policy) -> str:
    parts = _POLICY.fullmatch(name)
    if parts is None:
        return name
    key = ("AuthorizationPolicy", parts["namespace"], parts["name"])
    file = policy.files.get(key, "")
    return ": ".join(filter(None, (file, f"AuthorizationPolicy/{parts['name']}", f"spec.rules[{parts['rule']}]")))


def _policy_holds(body: Json, request: Request, port: int) -> bool | None:
    permission = _any(_holds(item, request, port) for item in body.get("permissions", ()))
    caller = _any(_holds(item, request, port) for item in body.get("principals", ()))
    return _all((permission, caller))


def _holds(item: Json, request: Request, port: int) -> bool | None:
    """One permission or principal of Envoy's; both are trees of the same few words."""
    (kind, value), *_ = item.items()
    if kind == "any":
        return bool(value)
    if kind in {"and_rules", "and_ids"}:
        return _all(_holds(part, request, port) for part in _parts(value))
    if kind in {"or_rules", "or_ids"}:
        return _any(_holds(part, request, port) for part in _parts(value))
    if kind in {"not_rule", "not_id"}:
        inner = _holds(value, request, port)
        return None if inner is None else not inner
    if kind == "url_path":
        return text_holds(value["path"], request.bare_path)
    if kind == "header":
        given = request.header(value["name"])
        if value.get("present_match"):
            return (given is not None) is not bool(value.get("invert_match"))
        return given is not None and "string_match" in value and text_holds(value["string_match"], given)
    if kind == "destination_port":
        return bool(value == port)
    if kind == "authenticated":
        name = value.get("principal_name")
        return True if name is None else text_holds(name, principal(request))
    if kind in {"direct_remote_ip", "remote_ip", "source_ip"}:
        network = ip_network(f"{value['address_prefix']}/{value.get('prefix_len', 32)}", strict=False)
        return None if request.caller == OUTSIDE else ip_address("127.0.0.1") in network
    return None  # metadata of a token, and whatever else a request alone does not show


def _parts(value: Json) -> list[Json]:
    return list(value.get("rules") or value.get("ids") or ())


def text_holds(wanted: Json, value: str) -> bool:
    """Envoy's StringMatcher."""
    if wanted.get("ignore_case"):
        value = value.lower()
        wanted = {key: item.lower() if isinstance(item, str) else item for key, item in wanted.items()}
    for kind, test in (("exact", str.__eq__), ("prefix", str.startswith), ("suffix", str.endswith)):
        if kind in wanted:
            return bool(test(value, wanted[kind]))
    if "contains" in wanted:
        return wanted["contains"] in value
    return re.fullmatch(wanted["safe_regex"]["regex"], value) is not None


def _all(values: Iterable[bool | None]) -> bool | None:
    found = list(values)
    return False if False in found else None if None in found else True


def _any(values: Iterable[bool | None]) -> bool | None:
    found = list(values)
    return True if True in found else None if None in found else False
