"""What stands at the door besides routing: gRPC-Web, compression, and which web pages may call (CORS).

`edge_filters` gives the HTTP filters of the ingress listener, in front of those that every listener has. The cors
filter is one of the latter, as in Istio: it does nothing on a route without `corsPolicy`.
"""

from services.mesh.policy import Policy
from services.mesh.policy.envoy_filter import CompressorFilter, EnvoyFilter
from services.mesh.policy.virtual_service import CorsPolicy
from services.mesh.translate.matching import string_match
from services.mesh.translate.names import TYPE_URL, Json
from services.mesh.translate.node import NodeSettings

CORS = "envoy.filters.http.cors"
GRPC_WEB = "envoy.filters.http.grpc_web"
_HTTP = TYPE_URL + "envoy.extensions.filters.http."
CORS_FILTER: Json = {"name": CORS, "typed_config": {"@type": _HTTP + "cors.v3.Cors"}}


def edge_filters(policy: Policy, node: NodeSettings) -> list[Json]:
    """gRPC-Web first, so that everything behind it sees plain gRPC; then the compressors.

    A compressor only acts on answers, which pass the filters backwards: it sees them as the service sent them, before
    gRPC-Web wraps them, and so leaves both kinds of gRPC alone.
    """
    filters: list[Json] = []
    gateways = [gateway for gateway in policy.doors if gateway.spec.servers[0].port.protocol == "GRPC-WEB"]
    if gateways:
        filters.append({"name": GRPC_WEB, "typed_config": {"@type": _HTTP + "grpc_web.v3.GrpcWeb"}})
    for item in policy.envoy_filters:
        if is_for_ingress(item, policy):
            filters += [
                patch.patch.value.model_dump(mode="json", by_alias=True, exclude_none=True)
                for patch in item.spec.config_patches
                if isinstance(patch.patch.value, CompressorFilter)
            ]
    return filters


def is_for_ingress(item: EnvoyFilter, policy: Policy) -> bool:
    """Locally the ingress carries exactly the labels that its Gateway selects."""
    labels = item.spec.workload_selector.labels.items()
    return any(labels <= gateway.spec.selector.items() for gateway in policy.doors)


def cors_policy(cors: CorsPolicy) -> Json:
    """The route's part. Preflights from other origins go on to the service unless the policy says IGNORE."""
    config: Json = {
        "@type": _HTTP + "cors.v3.CorsPolicy",
        "allow_origin_string_match": [string_match(origin) for origin in cors.allow_origins],
        "filter_enabled": {"default_value": {"numerator": 100, "denominator": "HUNDRED"}},
        "forward_not_matching_preflights": cors.unmatched_preflights != "IGNORE",
    }
    for name, values in (
        ("allow_methods", cors.allow_methods),
        ("allow_headers", cors.allow_headers),
        ("expose_headers", cors.expose_headers),
    ):
        if values:
            config[name] = ",".join(values)
    if cors.max_age is not None:
        config["max_age"] = str(int(cors.max_age.total_seconds()))
    if cors.allow_credentials is not None:
        config["allow_credentials"] = cors.allow_credentials
    return config
