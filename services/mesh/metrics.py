"""The supervisor's own Prometheus page: policy in force, weights, restarts. Read from the state when it is scraped."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.chassis import metrics_page
from services.mesh.state import MeshState


class StateCollector(Collector):
    """What the state file says, as metrics."""

    def __init__(self, state: Callable[[], MeshState]) -> None:
        self._state = state

    def collect(self) -> Iterable[Metric]:
        state = self._state()
        policy = state.policy
        for name, text, value in (
            ("autoglm_mesh_up", "1 once everything has been ready, until a stop begins", state.phase == "up"),
            ("autoglm_mesh_policy_refused", "1 while the newest edit of the policy is refused", _is_refused(state)),
            ("autoglm_mesh_policy_accepted_seconds", "When the policy in force was accepted", policy.accepted_unix_s),
            ("autoglm_mesh_policy_warnings", "Warnings about the policy in force", len(policy.warnings)),
        ):
            yield GaugeMetricFamily(name, text, value=float(value))
        weights = GaugeMetricFamily(
            "autoglm_mesh_route_weight",
            "Share of a route's traffic, in percent",
            labels=["host", "route", "destination"],
        )
        for weight in policy.weights:
            weights.add_metric([weight.host, weight.route, weight.destination], weight.weight)
        yield weights
        restarts = CounterMetricFamily("autoglm_mesh_restarts", "Restarts of a process", labels=["process"])
        ready = GaugeMetricFamily("autoglm_mesh_process_ready", "1 while the process is ready", labels=["process"])
        for process in state.processes:
            restarts.add_metric([process.name], process.restarts)
            ready.add_metric([process.name], float(process.phase == "ready"))
        yield restarts
        yield ready


def serve(state: Callable[[], MeshState], address: str, port: int) -> None:
    """Serves the page from a thread until the process ends. Raises OSError when the port is taken."""
    registry = CollectorRegistry()
    registry.register(StateCollector(state))
    metrics_page.serve(address, port, registry)


def _is_refused(state: MeshState) -> bool:
    return bool(state.policy.refused) and state.policy.refused_unix_s > state.policy.accepted_unix_s
