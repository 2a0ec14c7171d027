"""Who may call a workload: PeerAuthentication, RequestAuthentication and AuthorizationPolicy for one listener.

Istio's order: tokens are read first, then AUDIT, DENY and ALLOW. Without any ALLOW policy for a workload everything is
allowed that is not denied; with one, only what a rule of one of them names.
"""

from typing import Literal

from services.mesh.policy import Policy
from services.mesh.policy.security import ROOT_NAMESPACE, AuthorizationPolicy, PeerAuthentication, concerns
from services.mesh.registry import Workload
from services.mesh.translate.names import TYPE_URL, Json
from services.mesh.translate.rbac import rules_of
from services.mesh.translate.tokens import token_filter

Mode = Literal["STRICT", "PERMISSIVE", "DISABLE"]
RBAC_FILTER = "envoy.filters.http.rbac"
_ACTIONS = (("AUDIT", "LOG"), ("DENY", "DENY"), ("ALLOW", "ALLOW"))
_SHADOW_PREFIX = {"ALLOW": "istio_dry_run_allow_", "DENY": "istio_dry_run_deny_"}


def peer_mode(policy: Policy, workload: Workload, port: int) -> Mode:
    """What a listener asks of its callers: the narrowest scope that says something, PERMISSIVE where none does."""
    mode: Mode = "PERMISSIVE"
    for found in _scopes(policy, workload):
        if found is None:
            continue
        spec = found.spec
        if spec.mtls.mode != "UNSET":
            mode = spec.mtls.mode
        at_port = spec.port_level_mtls.get(str(port))
        if at_port is not None and at_port.mode != "UNSET":
            mode = at_port.mode
    return mode


def access_filters(policy: Policy, workload: Workload, port: int = 0) -> list[Json]:
    """The HTTP filters in front of a workload.

    `port` is the number that policies know the listener by. It decides `ports` conditions here and now: the local
    listener's own port, which Envoy would look at, is another one. 0 leaves them to Envoy.
    """
    tokens = [item for item in policy.request_authentications if concerns(item, workload)]
    filters = token_filter([rule for item in tokens for rule in item.spec.jwt_rules])
    policies = [item for item in policy.authorization_policies if concerns(item, workload)]
    for action, name in _ACTIONS:
        if chosen := [item for item in policies if item.spec.action == action]:
            filters.append(_rbac(name, chosen, port))
    return filters


def _scopes(policy: Policy, workload: Workload) -> tuple[PeerAuthentication | None, ...]:
    """The object of the mesh, of the namespace, of the workload. Of several in one scope the first counts."""
    mesh = namespace = own = None
    for item in policy.peer_authentications:
        if not concerns(item, workload):
            continue
        if item.spec.selector.match_labels:
            if item.metadata.namespace == workload.namespace:  # Istio ignores a selector in the root namespace
                own = own or item
        elif item.metadata.namespace == ROOT_NAMESPACE:
            mesh = mesh or item
        else:
            namespace = namespace or item
    return (mesh, namespace, own)


def _rbac(action: str, policies: list[AuthorizationPolicy], port: int) -> Json:
    enforced = [item for item in policies if not item.is_dry_run]
    shadow = [item for item in policies if item.is_dry_run]
    config: Json = {"@type": TYPE_URL + "envoy.extensions.filters.http.rbac.v3.RBAC"}
    if enforced:
        config["rules"] = rules_of(action, enforced, port)
    if shadow:
        config["shadow_rules"] = rules_of(action, shadow, port)
        if action in _SHADOW_PREFIX:
            config["shadow_rules_stat_prefix"] = _SHADOW_PREFIX[action]
    return {"name": RBAC_FILTER, "typed_config": config}
