"""Bodies of Envoy's own refusals (`local_reply_config` of an EnvoyFilter): at the ingress, or in front of a service."""

from services.mesh.policy import Policy
from services.mesh.policy.envoy_filter import EnvoyFilter
from services.mesh.registry import Workload
from services.mesh.translate.edge_filters import is_for_ingress
from services.mesh.translate.names import Json


def refusals_at_the_door(policy: Policy) -> Json:
    """What the ingress's connection manager gets, or nothing."""
    return _merged([item for item in policy.envoy_filters if is_for_ingress(item, policy)], "GATEWAY")


def refusals_in_front_of(policy: Policy, workload: Workload) -> Json:
    """The same for a workload's inbound listeners."""
    carried = dict(workload.labels).items()
    mine = [
        item
        for item in policy.envoy_filters
        if item.metadata.namespace == workload.namespace and item.spec.workload_selector.labels.items() <= carried
    ]
    return _merged(mine, "SIDECAR_INBOUND")


def _merged(items: list[EnvoyFilter], context: str) -> Json:
    """`check` refuses a second one for the same workloads; of two that overlap the first by name counts."""
    for item in items:
        for replies in item.spec.replies(context):
            return {"local_reply_config": replies.model_dump(mode="json", by_alias=True, exclude_unset=True)}
    return {}
