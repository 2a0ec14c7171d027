"""InferencePool → Envoy's ext_proc filter: off by default, switched on by the routes that lead to a picked host.

Two dialects. `resilient` sends the request headers; a picker that wants to see the body answers them with
`mode_override {request_body_mode: BUFFERED}` and decides on the body. `istio` streams everything through the picker, as
Istio does: needed for pickers written for that, but a picker that dies then fails every request, whatever the pool's
failureMode (docs/decisions/0002 has the measurements). Tokens are never copied through the picker in either.
"""

from collections.abc import Mapping

from services.mesh.translate.names import LB_NAMESPACE, TYPE_URL, Json, seconds
from services.mesh.translate.node import NodeSettings
from services.mesh.translate.world import PickedBy, World

EXT_PROC = "envoy.filters.http.ext_proc"
SUBSET_LABELS = "x-autoglm-subset-labels"
"""gRPC metadata of Envoy's call to the picker: the labels of the subset that the route's weights chose."""
_TYPES = TYPE_URL + "envoy.extensions.filters.http.ext_proc.v3."
_METADATA = {
    "forwarding_namespaces": {"untyped": [LB_NAMESPACE]},
    "receiving_namespaces": {"untyped": [LB_NAMESPACE]},
}


def picker_filter(world: World, node: NodeSettings) -> Json | None:
    """The filter every route passes: all phases skipped, so it costs nothing where no route switches it on."""
    picked = [host.picked_by for host in world.hosts.values() if host.picked_by is not None]
    if not picked:
        return None
    return {
        "name": EXT_PROC,
        "typed_config": {
            "@type": _TYPES + "ExternalProcessor",
            "grpc_service": _service(picked[0]),
            "failure_mode_allow": picked[0].fails_open,
            # The picker asks for the body where a request has an end; awaited always, it would hold up bidirectional
            # streams for ever.
            "allow_mode_override": node.picker_dialect == "resilient",
            "message_timeout": seconds(node.picker_message_timeout_s),
            "processing_mode": {
                "request_header_mode": "SKIP",
                "response_header_mode": "SKIP",
                "request_body_mode": "NONE",
                "response_body_mode": "NONE",
                "request_trailer_mode": "SKIP",
                "response_trailer_mode": "SKIP",
            },
            "metadata_options": _METADATA,
        },
    }


def per_route(picked_by: PickedBy, subset_labels: Mapping[str, str], node: NodeSettings) -> Json:
    """Switches the picker on, and tells it the subset it has to choose from."""
    streams_all = node.picker_dialect == "istio"
    overrides: Json = {
        "grpc_service": _service(picked_by),
        "failure_mode_allow": picked_by.fails_open,
        "processing_mode": {
            "request_header_mode": "SEND",
            "response_header_mode": "SEND",
            "request_body_mode": "FULL_DUPLEX_STREAMED" if streams_all else "NONE",
            "response_body_mode": "NONE",
            "request_trailer_mode": "SEND" if streams_all else "SKIP",
            "response_trailer_mode": "SKIP",
        },
        "metadata_options": _METADATA,
    }
    if subset_labels:
        value = ",".join(f"{key}={text}" for key, text in sorted(subset_labels.items()))
        overrides["grpc_initial_metadata"] = [{"key": SUBSET_LABELS, "value": value}]
    return {"@type": _TYPES + "ExtProcPerRoute", "overrides": overrides}


def _service(picked_by: PickedBy) -> Json:
    # By itself Envoy would send the cluster's name as authority, whose bars another Envoy refuses.
    return {"envoy_grpc": {"cluster_name": picked_by.cluster, "authority": f"{picked_by.host}:{picked_by.port}"}}
