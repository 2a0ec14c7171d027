"""Whether a proxy would let the request in, by the RBAC rules of its listener: the called service's, or the door's.

Three-valued: yes, no, or "depends" where a rule asks about something that is not known of the request.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Any, Literal

from services.mesh.explain.request import OUTSIDE, Request
from services.mesh.policy import Policy
from services.mesh.translate import Snapshot
from services.mesh.translate.names import Json
from services.mesh.translate.rbac import JWT_FILTER

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


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as one listener sees it. `principal` is empty without a certificate, `claims` without a token; None:
    not known here."""

    request: Request
    port: int
    principal: str
    claims: Mapping[str, Any] | None = None


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
            filters = [item for item in http_filters(listener) if item["name"].startswith(RBAC)]
            return rule(filters, policy, Asked(request, port, principal(request)))
    return Ruling("unchecked", "no proxy of this mesh stands in front of an endpoint")


def principal(request: Request, namespace: str = "autoglm") -> str:
    """Whose certificate the service sees: the caller's, and the door's own for whoever comes from outside."""
    account = DOOR if request.caller == OUTSIDE else request.caller
    return f"spiffe://{TRUST_DOMAIN}/ns/{namespace}/sa/{account}"


def http_filters(listener: Json) -> list[Json]:
    """The filters of a listener's last chain that speaks HTTP."""
    for chain in reversed(listener["filter_chains"]):
        for network in chain["filters"]:
            if "http_filters" in network["typed_config"]:
                found: list[Json] = network["typed_config"]["http_filters"]
                return found
    return []


def rule(filters: Sequence[Json], policy: Policy, asked: Asked) -> Ruling:
    """What the RBAC filters of one listener say together."""
    if not filters:
        return Ruling("allowed", "no AuthorizationPolicy speaks of this service")
    last = Ruling("allowed", "no rule denies it")
    for item in filters:
        rules = item["typed_config"].get("rules")
        if rules is None or rules.get("action") == "LOG":
            continue
        denies = rules.get("action") == "DENY"
        hits = {name: _policy_holds(body, asked) for name, body in rules.get("policies", {}).items()}
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
            who = asked.principal or "a caller without certificate"
            return Ruling("denied", f"no rule allows {who} this method ({names or 'no rules at all'})")
    return last


def _said(name: str, policy: Policy) -> str:
    parts = _POLICY.fullmatch(name)
    if parts is None:
        return name
    key = ("AuthorizationPolicy", parts["namespace"], parts["name"])
    file = policy.files.get(key, "")
    return ": ".join(filter(None, (file, f"AuthorizationPolicy/{parts['name']}", f"spec.rules[{parts['rule']}]")))


def _policy_holds(body: Json, asked: Asked) -> bool | None:
    permission = _any(_holds(item, asked) for item in body.get("permissions", ()))
    caller = _any(_holds(item, asked) for item in body.get("principals", ()))
    return _all((permission, caller))


def _holds(item: Json, asked: Asked) -> bool | None:
    """One permission or principal of Envoy's; both are trees of the same few words."""
    request = asked.request
    (kind, value), *_ = item.items()
    if kind == "any":
        return bool(value)
    if kind in {"and_rules", "and_ids"}:
        return _all(_holds(part, asked) for part in _parts(value))
    if kind in {"or_rules", "or_ids"}:
        return _any(_holds(part, asked) for part in _parts(value))
    if kind in {"not_rule", "not_id"}:
        inner = _holds(value, asked)
        return None if inner is None else not inner
    if kind == "url_path":
        return text_holds(value["path"], request.bare_path)
    if kind == "header":
        given = request.header(value["name"])
        if value.get("present_match"):
            return (given is not None) is not bool(value.get("invert_match"))
        return given is not None and "string_match" in value and text_holds(value["string_match"], given)
    if kind == "destination_port":
        return bool(value == asked.port)
    if kind == "authenticated":
        name = value.get("principal_name")
        return bool(asked.principal) and (name is None or text_holds(name, asked.principal))
    if kind in {"direct_remote_ip", "remote_ip", "source_ip"}:
        network = ip_network(f"{value['address_prefix']}/{value.get('prefix_len', 32)}", strict=False)
        return None if request.caller == OUTSIDE else ip_address("127.0.0.1") in network
    if kind == "metadata" and asked.claims is not None and value["filter"] == JWT_FILTER:
        return _claim_holds(asked.claims, [step["key"] for step in value["path"]][1:], value["value"])
    return None  # what a request alone does not show


def _claim_holds(claims: Mapping[str, Any], path: Sequence[str], wanted: Json) -> bool:
    found: Any = claims
    for key in path:
        if not isinstance(found, Mapping) or key not in found:
            return False
        found = found[key]
    return _value_holds(wanted, found)


def _value_holds(wanted: Json, found: Any) -> bool:
    """Envoy's ValueMatcher, as far as access rules use it."""
    if "or_match" in wanted:
        return any(_value_holds(item, found) for item in wanted["or_match"]["value_matchers"])
    if "list_match" in wanted:
        return isinstance(found, list) and any(_value_holds(wanted["list_match"]["one_of"], item) for item in found)
    return isinstance(found, str) and text_holds(wanted["string_match"], found)


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
