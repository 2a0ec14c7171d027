"""Parts of ext_proc messages for `server_ext_proc`: what Envoy says beside the body, and how a refusal is put."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping

from autoglm.third_party import envoy_core_pb2 as core
from autoglm.third_party import ext_proc_pb2 as ext_proc
from google.protobuf.struct_pb2 import Struct

from services.chassis.errors import ServiceError, status_of

SUBSET_HINT = ("envoy.lb.subset_hint", "x-gateway-destination-endpoint-subset")
SUBSET_LABELS = "x-autoglm-subset-labels"
CLUSTER_NAME = "xds.cluster_name"
VERSION_LABEL = "version"

_TIMEOUT = re.compile(r"(\d{1,8})([HMSmun])")
_UNIT_MS = {"H": 3_600_000.0, "M": 60_000.0, "S": 1000.0, "m": 1.0, "u": 1e-3, "n": 1e-6}
_HTTP_STATUS = {3: 400, 5: 404, 8: 429, 9: 412, 13: 500, 14: 503}
_OVERWRITE = core.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD


def streamed(body: bytes, end_of_stream: bool) -> ext_proc.BodyResponse:
    """A part of the body for the other side."""
    part = ext_proc.StreamedBodyResponse(body=body, end_of_stream=end_of_stream)
    mutation = ext_proc.BodyMutation(streamed_response=part)
    return ext_proc.BodyResponse(response=ext_proc.CommonResponse(body_mutation=mutation))


def header(name: str, value: bytes) -> core.HeaderValueOption:
    """A header that replaces what the caller may have sent."""
    return core.HeaderValueOption(header=core.HeaderValue(key=name, raw_value=value), append_action=_OVERWRITE)


def local_reply(error: ServiceError) -> ext_proc.ProcessingResponse:
    """The refusal as Envoy's own answer; a gRPC caller sees the status and trailers it would see from any service."""
    code, text, trailers = status_of(error)
    number: int = code.value[0]
    headers = [
        header(name, base64.b64encode(value).rstrip(b"=") if isinstance(value, bytes) else value.encode())
        for name, value in trailers
    ]
    reply = ext_proc.ImmediateResponse(
        headers=ext_proc.HeaderMutation(set_headers=headers),
        body=text.encode(),
        grpc_status=ext_proc.GrpcStatus(status=number),
        details=f"picker_{code.name.lower()}",
    )
    reply.status.code = _HTTP_STATUS.get(number, 500)  # type: ignore[assignment]  # the enum is open
    return ext_proc.ProcessingResponse(immediate_response=reply)


def timeout_ms(text: str) -> int:
    """`grpc-timeout` in whole milliseconds, at least 1; 0 when there is none."""
    match = _TIMEOUT.fullmatch(text)
    return max(1, int(int(match.group(1)) * _UNIT_MS[match.group(2)])) if match else 0


def hint_from(metadata: Mapping[str, Struct]) -> tuple[str, ...] | None:
    """Endpoints the proxy allows; None when it does not say."""
    namespace, key = SUBSET_HINT
    facts = metadata.get(namespace)
    if facts is None or key not in facts.fields:
        return None
    value = facts.fields[key]
    if value.WhichOneof("kind") == "string_value":
        return tuple(part.strip() for part in value.string_value.split(",") if part.strip())
    return tuple(entry.string_value for entry in value.list_value.values if entry.string_value)


def labels_from(metadata: object) -> tuple[tuple[str, str], ...]:
    """Labels from the gRPC metadata of Envoy's call, `k=v,k2=v2`, sorted."""
    for name, value in metadata or ():  # type: ignore[attr-defined]  # grpc's own Metadata is not typed as iterable
        if name == SUBSET_LABELS:
            text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
            pairs = (part.partition("=") for part in text.split(",") if part)
            return tuple(sorted((key.strip(), label.strip()) for key, _, label in pairs))
    return ()


def labels_from_cluster(attributes: Mapping[str, Struct]) -> tuple[tuple[str, str], ...]:
    """The subset in a cluster name as Istio writes it, `outbound|50051|v1|host`, read as version=v1."""
    for facts in attributes.values():
        if CLUSTER_NAME in facts.fields:
            parts = facts.fields[CLUSTER_NAME].string_value.split("|")
            if len(parts) == 4 and parts[2]:
                return ((VERSION_LABEL, parts[2]),)
    return ()
