"""One request's story: listener, virtual host, route, destinations, and for each decision the YAML behind it.

Pure: it reads a translated snapshot, the very thing Envoy gets, and the policy only to name files and objects.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from services.mesh.explain.access import Ruling, judge
from services.mesh.explain.door import at_the_door, door_of
from services.mesh.explain.matching import failed_conditions, first_match, virtual_host
from services.mesh.explain.request import OUTSIDE, Request
from services.mesh.policy import Policy
from services.mesh.policy.checks import picks_for
from services.mesh.registry import Registry
from services.mesh.translate import Snapshot
from services.mesh.translate.names import UNLIMITED, Json, config_path

CORS, FAULT, EXT_PROC = (f"envoy.filters.http.{name}" for name in ("cors", "fault", "ext_proc"))


class CannotExplain(Exception):
    """The question does not fit this mesh; the text says what there is to ask about."""


@dataclass(frozen=True, slots=True)
class Fact:
    """Something decided about the request. `source` is `file: object: path`, or nothing for Istio's own defaults."""

    what: str
    value: str
    source: str = ""


@dataclass(frozen=True, slots=True)
class Target:
    """One cluster that the request may go to, with its share in percent and how it is reached."""

    cluster: str
    percent: float
    facts: tuple[Fact, ...]
    access: Ruling


@dataclass(frozen=True, slots=True)
class Explanation:
    """The whole story. `action` is forward, redirect, answer (by Envoy itself) or nothing (no route)."""

    listener: str
    virtual_host: str
    route: str
    action: str
    facts: tuple[Fact, ...]
    targets: tuple[Target, ...]
    passed_over: tuple[Fact, ...]
    """Routes that stand before the one taken, and why they do not apply."""
    door: Ruling | None = None
    """Whether it is let in at all, where it comes from outside. The rest is told as if it were."""


def explain(snapshot: Snapshot, policy: Policy, registry: Registry, request: Request) -> Explanation:
    """Raises `CannotExplain` when nobody of that name calls."""
    listener, manager = _listener(snapshot, request.caller)
    cleaned = request.cleaned(_removed(manager))
    configuration = next(item for item in snapshot.routes if item["name"] == manager["rds"]["route_config_name"])
    dropped = sorted(name for name in request.headers if name.lower() not in cleaned.headers)
    facts = [Fact("headers removed at the door", ", ".join(dropped))] if dropped else []
    ruling: Ruling | None = None
    if (standing := door_of(snapshot, request)) is not None:
        ruling, seen = at_the_door(standing, policy, cleaned)
        written = sorted(set(seen.headers.items()) - set(cleaned.headers.items()))
        facts += [Fact("header from the token", f"{name}: {value}") for name, value in written]
        cleaned = seen
    host = virtual_host(configuration, request.authority)
    found = first_match(host["routes"], cleaned) if host is not None else None
    if host is None or found is None:
        why = f"no virtual host for {request.authority}" if host is None else "no route matches"
        passed = () if host is None else tuple(_passed_over(host["routes"], cleaned, policy))
        name = host["name"] if host is not None else ""
        return Explanation(listener, name, "", "nothing", (*facts, Fact("answer", f"404 ({why})")), (), passed, ruling)
    number, route = found
    source = _source(route, policy)
    facts.append(Fact("route", route["name"], source or "Istio's default for a host without VirtualService"))
    passed = tuple(_passed_over(host["routes"][:number], cleaned, policy))
    action, more = _action(route, source)
    facts += more
    facts += _per_route(route, source)
    targets = tuple(_targets(snapshot, policy, registry, route, cleaned)) if action == "forward" else ()
    return Explanation(listener, host["name"], route["name"], action, tuple(facts), targets, passed, ruling)


def _listener(snapshot: Snapshot, caller: str) -> tuple[str, Json]:
    wanted = ("ingress",) if caller == OUTSIDE else (f"{caller}~outbound", "outbound")
    for name in wanted:
        for listener in snapshot.listeners:
            if listener["name"] == name:
                return name, http_manager(listener)
    callers = [item["name"].partition("~")[0] for item in snapshot.listeners if item["name"].endswith("~outbound")]
    known = ", ".join(sorted({OUTSIDE, *callers}))
    raise CannotExplain(f"nobody called {caller} has a listener here; who calls is one of: {known}")


def http_manager(listener: Json) -> Json:
    """The HTTP connection manager of a listener's last filter chain (the one for TLS, where there are two)."""
    for chain in reversed(listener["filter_chains"]):
        for network in chain["filters"]:
            if "http_filters" in network["typed_config"]:
                config: Json = network["typed_config"]
                return config
    raise CannotExplain(f"listener {listener['name']} does not speak HTTP")


def _removed(manager: Json) -> list[str]:
    return [
        mutation["remove_on_match"]["key_matcher"]["prefix"]
        for extension in manager.get("early_header_mutation_extensions", ())
        for mutation in extension["typed_config"]["mutations"]
        if "remove_on_match" in mutation
    ]


def _passed_over(routes: Sequence[Json], request: Request, policy: Policy) -> Iterator[Fact]:
    for route in routes:
        yield Fact(route["name"], "; ".join(failed_conditions(route["match"], request)), _source(route, policy))


def _source(resource: Json, policy: Policy) -> str:
    metadata = resource.get("metadata", {}).get("filter_metadata", {})
    return place(metadata.get("istio", {}).get("config", ""), policy, metadata.get("autoglm", {}).get("path", ""))


def place(config: str, policy: Policy, path: str = "") -> str:
    """`file: Kind/name: path` of the object that Istio calls `config`."""
    for item in policy:
        if config and config_path(item) == config:
            parts = (policy.file_of(item), f"{item.kind}/{item.metadata.name}", path)
            return ": ".join(part for part in parts if part)
    return config


def _action(route: Json, source: str) -> tuple[str, list[Fact]]:
    if "redirect" in route:
        wanted = ", ".join(f"{key} {value}" for key, value in sorted(route["redirect"].items()))
        return "redirect", [Fact("answer", wanted, source)]
    if "direct_response" in route:
        return "answer", [Fact("answer", f"{route['direct_response']['status']}, by Envoy itself", source)]
    action = route["route"]
    span = "none; the caller's own deadline holds" if action["timeout"] == "0s" else action["timeout"]
    facts = [
        Fact("timeout", span, source if action["timeout"] != "0s" else ""),
        Fact("retries", _retries(action.get("retry_policy")), source),
    ]
    for key in ("prefix_rewrite", "host_rewrite_literal"):
        if key in action:
            facts.append(Fact(key.replace("_", " "), action[key], source))
    if "regex_rewrite" in action:
        rewrite = action["regex_rewrite"]
        facts.append(Fact("path rewrite", f"{rewrite['pattern']['regex']} → {rewrite['substitution']}", source))
    for mirror in action.get("request_mirror_policies", ()):
        fraction = mirror["runtime_fraction"]["default_value"]["numerator"] / 10_000
        facts.append(Fact("mirrored", f"{fraction:g} % to {mirror['cluster']}", source))
    for hashed in action.get("hash_policy", ()):
        facts.append(Fact("sticks by", _hash(hashed)))
    return "forward", facts


def _retries(policy: Json | None) -> str:
    if policy is None:
        return "none"
    words = f"{policy['num_retries']}, on {policy['retry_on']}"
    if "per_try_timeout" in policy:
        words += f", {policy['per_try_timeout']} each"
    if "retry_host_predicate" in policy:
        words += ", not on a host that failed"
    return words + (", then in other localities" if "retry_priority" in policy else "")


def _hash(policy: Json) -> str:
    if "header" in policy:
        return f"header {policy['header']['header_name']}"
    if "cookie" in policy:
        return f"cookie {policy['cookie']['name']}"
    return f"query {policy['query_parameter']['name']}" if "query_parameter" in policy else "source address"


def _per_route(route: Json, source: str) -> Iterator[Fact]:
    filters = route.get("typed_per_filter_config", {})
    if FAULT in filters:
        for kind in ("delay", "abort"):
            if kind in filters[FAULT]:
                part = filters[FAULT][kind]
                said = part.get("fixed_delay") or part.get("http_status") or f"gRPC status {part.get('grpc_status')}"
                yield Fact("fault", f"{kind} {said} for {part['percentage']['numerator'] / 10_000:g} %", source)
    if CORS in filters:
        origins = [next(iter(origin.values())) for origin in filters[CORS]["allow_origin_string_match"]]
        yield Fact("pages that may call", ", ".join(map(str, origins)) or "none", source)


def _targets(snapshot: Snapshot, policy: Policy, registry: Registry, route: Json, request: Request) -> Iterator[Target]:
    action = route["route"]
    shares = action.get("weighted_clusters", {}).get("clusters") or [{"name": action["cluster"], "weight": 1}]
    total = sum(item["weight"] for item in shares)
    clusters = {cluster["name"]: cluster for cluster in snapshot.clusters}
    for share in shares:
        cluster = clusters[share["name"]]
        filters = route.get("typed_per_filter_config", {}) | share.get("typed_per_filter_config", {})
        endpoints = assignment(snapshot, cluster)
        facts = list(_reached(cluster, policy)) + list(_places(endpoints))
        if EXT_PROC in filters:
            facts.insert(0, _picker(filters[EXT_PROC], cluster, policy, registry))
        yield Target(
            cluster["name"],
            round(100 * share["weight"] / total, 2),
            tuple(facts),
            judge(snapshot, policy, endpoints, request),
        )


def assignment(snapshot: Snapshot, cluster: Json) -> list[Json]:
    """The endpoints of a cluster by locality, nearest first."""
    if "load_assignment" in cluster:
        found: list[Json] = cluster["load_assignment"]["endpoints"]
        return found
    name = cluster.get("eds_cluster_config", {}).get("service_name", cluster["name"])
    return next((item["endpoints"] for item in snapshot.endpoints if item["cluster_name"] == name), [])


def _picker(config: Json, cluster: Json, policy: Policy, registry: Registry) -> Fact:
    overrides = config["overrides"]
    asked = overrides["grpc_service"]["envoy_grpc"]["cluster_name"]
    without = "Envoy balances by itself" if overrides["failure_mode_allow"] else "requests fail"
    host = cluster["metadata"]["filter_metadata"]["istio"]["services"][0]["host"]
    service = next((item for item in registry.services if item.host == host), None)
    pool = next((item for item in policy.inference_pools if service is not None and picks_for(item, service)), None)
    source = place(config_path(pool), policy) if pool is not None else ""
    return Fact("endpoint chosen by", f"{asked}; without it {without}", source)


def _reached(cluster: Json, policy: Policy) -> Iterator[Fact]:
    source = _source(cluster, policy)
    balancer = cluster["lb_policy"]
    if balancer == "CLUSTER_PROVIDED" and "load_balancing_policy" in cluster:
        inner = cluster["load_balancing_policy"]["policies"][0]["typed_extension_config"]["typed_config"]
        names = [part["typed_extension_config"]["name"] for part in inner["fallback_policy"]["policies"]]
        balancer = f"the picker's word, else {names[0].rpartition('.')[2].upper()}"
    yield Fact("balancing", balancer, source)
    limits = cluster["circuit_breakers"]["thresholds"][0]
    bounds = [
        f"{key} {value}" for key, value in sorted(limits.items()) if key.startswith("max_") and value != UNLIMITED
    ]
    yield Fact("pool", f"connect within {cluster['connect_timeout']}, {', '.join(bounds) or 'no limits'}", source)
    ejects = cluster.get("outlier_detection")
    if ejects is not None:
        said = ", ".join(f"{key} {value}" for key, value in sorted(ejects.items()) if not key.startswith("enforcing"))
        yield Fact("ejection", said or "Envoy's defaults", source)
    if "transport_socket" in cluster or "transport_socket_matches" in cluster:
        yield Fact("encryption", "mutual TLS", source)


def _places(endpoints: Sequence[Json]) -> Iterator[Fact]:
    """Who would be asked, in order: all of the first rank before any of the second."""
    if not any(group["lb_endpoints"] for group in endpoints):
        yield Fact("endpoints", "none: Envoy answers UNAVAILABLE")
    for group in sorted(endpoints, key=lambda item: int(item.get("priority", 0))):
        where = "/".join(group["locality"].get(key, "") for key in ("region", "zone", "sub_zone")).strip("/")
        members = [item["endpoint"]["address"]["socket_address"] for item in group["lb_endpoints"]]
        shown = ", ".join(f"{item['address']}:{item['port_value']}" for item in members)
        if members:
            weight = group.get("load_balancing_weight", len(members))
            yield Fact(
                f"endpoints, rank {group.get('priority', 0)}", f"{where or 'no locality'} (weight {weight}): {shown}"
            )
