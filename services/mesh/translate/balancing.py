"""`loadBalancer` → Envoy's load balancing policy, and the request hash that ring hashing needs on the route.

A host placed by an endpoint picker uses `override_host`: the picker's choice first, and the rule's own balancing for
every request on which the picker said nothing.
"""

from services.mesh.policy.destination_rule import ConsistentHash, LoadBalancer, Warmup
from services.mesh.translate.names import DESTINATION_HEADER, LB_NAMESPACE, TYPE_URL, Json, seconds

_POLICY_TYPES = TYPE_URL + "envoy.extensions.load_balancing_policies."
_LOWER = {"LEAST_REQUEST": "least_request", "ROUND_ROBIN": "round_robin", "RANDOM": "random"}
_MESSAGE = {"least_request": "LeastRequest", "round_robin": "RoundRobin", "random": "Random"}
MINIMUM_RING_SIZE = 1024
SERVED_KEY = DESTINATION_HEADER + "-served"


def balancing(balancer: LoadBalancer | None, *, is_picked: bool, weighs_places: bool = False) -> Json:
    """The fields of a cluster that choose its endpoint.

    A balancing policy in the typed form does not see the cluster's `locality_weighted_lb_config`: it has its own.
    """
    if is_picked:
        override = _override_host(balancer, weighs_places)
        return {"lb_policy": "CLUSTER_PROVIDED", "load_balancing_policy": {"policies": [override]}}
    hashing = balancer.consistent_hash if balancer is not None else None
    if hashing is not None:
        if hashing.maglev is not None:
            size = {"table_size": hashing.maglev.table_size} if hashing.maglev.table_size is not None else {}
            return {"lb_policy": "MAGLEV", "maglev_lb_config": size}
        return {"lb_policy": "RING_HASH", "ring_hash_lb_config": {"minimum_ring_size": _ring_size(hashing)}}
    policy = _simple(balancer)
    config: Json = {"lb_policy": policy}
    warmup = balancer.warmup if balancer is not None else None
    if warmup is not None:
        config[f"{_LOWER[policy]}_lb_config"] = {"slow_start_config": _slow_start(warmup)}
    return config


def hash_policy(balancer: LoadBalancer | None) -> Json | None:
    """What the route hashes for a destination with `consistentHash`."""
    hashing = balancer.consistent_hash if balancer is not None else None
    if hashing is None:
        return None
    if hashing.http_header_name is not None:
        return {"header": {"header_name": hashing.http_header_name}}
    if hashing.http_query_parameter_name is not None:
        return {"query_parameter": {"name": hashing.http_query_parameter_name}}
    if hashing.http_cookie is not None:
        cookie = hashing.http_cookie
        extra: Json = {"ttl": seconds(cookie.ttl)} if cookie.ttl is not None else {}
        if cookie.path is not None:
            extra["path"] = cookie.path
        return {"cookie": {"name": cookie.name, **extra}}
    return {"connection_properties": {"source_ip": True}}


def _simple(balancer: LoadBalancer | None) -> str:
    chosen = balancer.simple if balancer is not None else None
    return chosen if chosen in {"ROUND_ROBIN", "RANDOM"} else "LEAST_REQUEST"


def _ring_size(hashing: ConsistentHash) -> int:
    inner = hashing.ring_hash.minimum_ring_size if hashing.ring_hash is not None else None
    return inner or hashing.minimum_ring_size or MINIMUM_RING_SIZE


def _slow_start(warmup: Warmup) -> Json:
    return {
        "slow_start_window": seconds(warmup.duration),
        "aggression": {
            "default_value": warmup.aggression if warmup.aggression is not None else 1,
            "runtime_key": "(",  # Istio's: a key nobody can set, where Envoy demands one
        },
        "min_weight_percent": {"value": warmup.minimum_percent if warmup.minimum_percent is not None else 10},
    }


def _override_host(balancer: LoadBalancer | None, weighs_places: bool) -> Json:
    config = {
        "@type": _POLICY_TYPES + "override_host.v3.OverrideHost",
        "override_host_sources": [
            {"metadata": {"key": LB_NAMESPACE, "path": [{"key": DESTINATION_HEADER}]}},
            {"header": DESTINATION_HEADER},
        ],
        "selected_host_key": {"key": LB_NAMESPACE, "path": [{"key": SERVED_KEY}]},
        "fallback_policy": {"policies": [_fallback(balancer, weighs_places)]},
    }
    return _extension("envoy.load_balancing_policies.override_host", config)


def _fallback(balancer: LoadBalancer | None, weighs_places: bool) -> Json:
    hashing = balancer.consistent_hash if balancer is not None else None
    places: Json = {"locality_lb_config": {"locality_weighted_lb_config": {}}} if weighs_places else {}
    if hashing is not None:
        if hashing.maglev is not None:
            size = {"table_size": hashing.maglev.table_size} if hashing.maglev.table_size is not None else {}
            maglev = {"@type": _POLICY_TYPES + "maglev.v3.Maglev", **size, **_hashed(weighs_places)}
            return _extension("envoy.load_balancing_policies.maglev", maglev)
        ring = {"@type": _POLICY_TYPES + "ring_hash.v3.RingHash", "minimum_ring_size": _ring_size(hashing)}
        ring |= _hashed(weighs_places)
        return _extension("envoy.load_balancing_policies.ring_hash", ring)
    name = _LOWER[_simple(balancer)]
    config: Json = {"@type": f"{_POLICY_TYPES}{name}.v3.{_MESSAGE[name]}", **places}
    warmup = balancer.warmup if balancer is not None else None
    if warmup is not None:
        config["slow_start_config"] = _slow_start(warmup)
    return _extension(f"envoy.load_balancing_policies.{name}", config)


def _hashed(weighs_places: bool) -> Json:
    return {"locality_weighted_lb_config": {}} if weighs_places else {}


def _extension(name: str, config: Json) -> Json:
    return {"typed_extension_config": {"name": name, "typed_config": config}}
