"""Who may call a workload: stands where PeerAuthentication and AuthorizationPolicy are translated."""

from typing import Literal

from services.mesh.policy import Policy
from services.mesh.registry import Workload
from services.mesh.translate.names import Json


def peer_mode(policy: Policy, workload: Workload, port: int) -> Literal["STRICT", "PERMISSIVE", "DISABLE"]:
    """Istio's default: mutual TLS where the caller offers it."""
    return "PERMISSIVE"


def access_filters(policy: Policy, workload: Workload) -> list[Json]:
    """No policy, no filter."""
    return []
