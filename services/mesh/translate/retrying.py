"""`retries` → Envoy's retry policy, with the one Istio gives to routes that say nothing."""

from services.mesh.policy.virtual_service import Retries
from services.mesh.translate.names import TYPE_URL, Json, seconds

DEFAULT_RETRY_ON = "connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes"
DEFAULT_RETRIES = 2
HOST_SELECTION_ATTEMPTS = 5
_PREVIOUS_HOSTS = {
    "name": "envoy.retry_host_predicates.previous_hosts",
    "typed_config": {"@type": TYPE_URL + "envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"},
}
_PREVIOUS_PRIORITIES = {
    "name": "envoy.retry_priorities.previous_priorities",
    "typed_config": {
        "@type": TYPE_URL + "envoy.extensions.retry.priority.previous_priorities.v3.PreviousPrioritiesConfig",
        "update_frequency": 2,
    },
}


def retry_policy(retries: Retries | None, *, is_hashed: bool) -> Json | None:
    """None means no retries. With a consistent hash a retry stays with its host unless the rule says otherwise."""
    if retries is not None and retries.attempts == 0:
        return None
    policy: Json = {
        "retry_on": DEFAULT_RETRY_ON,
        "num_retries": DEFAULT_RETRIES if retries is None else retries.attempts,
        "host_selection_retry_max_attempts": HOST_SELECTION_ATTEMPTS,
    }
    avoids_previous = not is_hashed
    if retries is not None:
        if retries.retry_on is not None:
            policy |= _conditions(retries.retry_on)
        if retries.per_try_timeout is not None:
            policy["per_try_timeout"] = seconds(retries.per_try_timeout)
        if retries.backoff is not None:
            policy["retry_back_off"] = {"base_interval": seconds(retries.backoff)}
        if retries.retry_remote_localities:
            policy["retry_priority"] = _PREVIOUS_PRIORITIES
        if retries.retry_ignore_previous_hosts is not None:
            avoids_previous = retries.retry_ignore_previous_hosts
    if avoids_previous:
        policy["retry_host_predicate"] = [_PREVIOUS_HOSTS]
    return policy


def _conditions(text: str) -> Json:
    words = [word.strip() for word in text.split(",")]
    codes = [int(word) for word in words if word.isdigit()]
    names = [word for word in words if not word.isdigit()]
    if not codes:
        return {"retry_on": ",".join(names)}
    if "retriable-status-codes" not in names:
        names.append("retriable-status-codes")
    return {"retry_on": ",".join(names), "retriable_status_codes": codes}
