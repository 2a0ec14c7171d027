"""Rate limit of an EnvoyFilter → Envoy at the ingress: requests by tenant, refused before anything behind is asked.

The filter itself is empty and in the listener, right before the router: after whatever sets the tenant's header from a
verified token. Its settings are in the routes, so that a changed limit drains nothing.
"""

from services.mesh.policy import Policy
from services.mesh.policy.rate_limit import LimitFilter
from services.mesh.translate.edge_filters import is_for_ingress
from services.mesh.translate.names import Json


def rate_limit_filters(policy: Policy) -> list[Json]:
    """The HTTP filter of the ingress, where the policy has one (`check` refuses a second)."""
    return [
        patch.patch.value.model_dump(mode="json", by_alias=True, exclude_none=True)
        for item in policy.envoy_filters
        if is_for_ingress(item, policy)
        for patch in item.spec.config_patches
        if isinstance(patch.patch.value, LimitFilter)
    ]


def host_rate_limits(policy: Policy) -> Json:
    """What each virtual host of the ingress says to that filter: `typed_per_filter_config`, or nothing."""
    return {
        name: value
        for item in policy.envoy_filters
        if is_for_ingress(item, policy)
        for settings in item.spec.limits
        for name, value in settings.model_dump(mode="json", by_alias=True, exclude_unset=True).items()
    }
