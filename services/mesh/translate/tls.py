"""Mutual TLS as Istio sets it up: who shows which certificate, whom it accepts, and with which ciphers.

Certificates come as files (SDS) from the folder that `services/mesh/identity` keeps; nothing here changes when they do.
"""

from pathlib import Path
from typing import Literal

from services.mesh.policy.destination_rule import ClientTls
from services.mesh.translate.names import TYPE_URL, Json

CERTIFICATE = "default"
ROOT = "ROOTCA"
"""Istio's names of the two secrets."""
ROOT_FOLDER = "root"
SDS_FILE = "sds.json"
ALPN_H2 = ("istio-peer-exchange", "istio", "h2")
ALPN_HTTP1 = ("istio-peer-exchange", "istio")
MESH_ALPN = ("istio", "istio-peer-exchange", "istio-http/1.0", "istio-http/1.1", "istio-h2")
"""What tells a mesh member's connection from any other TLS on a permissive port."""
CIPHERS = (
    "ECDHE-ECDSA-AES256-GCM-SHA384",
    "ECDHE-RSA-AES256-GCM-SHA384",
    "ECDHE-ECDSA-AES128-GCM-SHA256",
    "ECDHE-RSA-AES128-GCM-SHA256",
    "AES256-GCM-SHA384",
    "AES128-GCM-SHA256",
)
IS_MESHED = {"tlsMode": "istio"}
_TLS = TYPE_URL + "envoy.extensions.transport_sockets.tls.v3."
_RAW: Json = {
    "name": "envoy.transport_sockets.raw_buffer",
    "typed_config": {"@type": TYPE_URL + "envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer"},
}
_INSPECTOR: Json = {
    "name": "envoy.filters.listener.tls_inspector",
    "typed_config": {"@type": TYPE_URL + "envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector"},
}

Mode = Literal["STRICT", "PERMISSIVE", "DISABLE"]


def client_side(
    tls: ClientTls | None, identities: Path | None, caller: str, accepted: tuple[str, ...], name: str, *, is_h2: bool
) -> Json:
    """The fields of a cluster that choose its transport.

    Without a rule it is automatic: TLS to endpoints that have a sidecar, plain to the others.
    """
    if tls is not None and tls.mode == "DISABLE":
        return {}
    if identities is None or not caller:
        if tls is not None:
            raise ValueError(f"tls.mode {tls.mode} for {name}, but this proxy has no identity")
        return {}
    server_name = tls.sni if tls is not None and tls.sni is not None else name
    names = tls.subject_alt_names if tls is not None and tls.subject_alt_names else accepted
    context: Json = {
        "@type": _TLS + "UpstreamTlsContext",
        "sni": server_name,
        "common_tls_context": {
            **_common(identities, caller, names),
            "alpn_protocols": list(ALPN_H2 if is_h2 else ALPN_HTTP1),
        },
    }
    socket = {"name": "envoy.transport_sockets.tls", "typed_config": context}
    if tls is not None:
        return {"transport_socket": socket}
    return {
        "transport_socket_matches": [
            {"name": "tlsMode-istio", "match": IS_MESHED, "transport_socket": socket},
            {"name": "tlsMode-disabled", "match": {}, "transport_socket": _RAW},
        ]
    }


def server_side(mode: Mode, identities: Path, account: str, filters: list[Json]) -> Json:
    """The fields of an inbound listener that say who may connect; `filters` come behind every accepted connection."""
    plain = {"filters": filters}
    if mode == "DISABLE":
        return {"filter_chains": [plain]}
    context = {
        "@type": _TLS + "DownstreamTlsContext",
        "require_client_certificate": True,
        "common_tls_context": {
            **_common(identities, account, ()),
            "alpn_protocols": ["h2", "http/1.1"],
        },
    }
    secure: Json = {
        "filters": filters,
        "transport_socket": {"name": "envoy.transport_sockets.tls", "typed_config": context},
    }
    if mode == "STRICT":  # the only chain: whatever is no handshake is refused by the socket itself
        return {"filter_chains": [secure]}
    return {
        "listener_filters": [_INSPECTOR],
        "filter_chains": [
            {
                **secure,
                "name": "mutual-tls",
                "filter_chain_match": {"transport_protocol": "tls", "application_protocols": list(MESH_ALPN)},
            },
            {**plain, "name": "plain", "filter_chain_match": {"transport_protocol": "raw_buffer"}},
        ],
    }


def _common(identities: Path, account: str, accepted: tuple[str, ...]) -> Json:
    matches = [{"san_type": "URI", "matcher": {"exact": name}} for name in accepted]
    return {
        "tls_params": {
            "tls_minimum_protocol_version": "TLSv1_2",
            "tls_maximum_protocol_version": "TLSv1_3",
            "cipher_suites": list(CIPHERS),
        },
        "tls_certificate_sds_secret_configs": [_secret(identities / account, CERTIFICATE)],
        "combined_validation_context": {
            "default_validation_context": {"match_typed_subject_alt_names": matches} if matches else {},
            "validation_context_sds_secret_config": _secret(identities / ROOT_FOLDER, ROOT),
        },
    }


def _secret(folder: Path, name: str) -> Json:
    return {
        "name": name,
        "sds_config": {"path_config_source": {"path": str(folder / SDS_FILE)}, "resource_api_version": "V3"},
    }
