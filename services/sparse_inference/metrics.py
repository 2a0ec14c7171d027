"""The worker's gauges, under our names and under the names that pickers of vLLM servers scrape."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import REGISTRY, CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.runtime.blocks import BlockStore
from services.sparse_inference.settings import WorkerSettings
from services.sparse_inference.worker import Worker


class LoadCollector(Collector):
    """Reads the loop's load when the page is fetched; nothing is updated in between."""

    def __init__(self, settings: WorkerSettings, worker: Worker, store: BlockStore) -> None:
        self._settings, self._worker, self._store = settings, worker, store

    def collect(self) -> Iterable[Metric]:
        load, limits = self._worker.load(), self._settings.limits
        labels = {"model_name": self._settings.model_name}
        used = load.kv_used_bytes / limits.kv_capacity_bytes
        gauges = (
            ("autoglm_requests_running", "Requests being computed", load.running),
            ("autoglm_requests_waiting", "Requests queued", load.waiting),
            ("autoglm_kv_used_bytes", "Key-value memory reserved by running requests", load.kv_used_bytes),
            ("autoglm_kv_capacity_bytes", "Key-value memory at most", limits.kv_capacity_bytes),
            ("autoglm_prefix_store_bytes", "Key-value blocks kept after their request", self._store.used_bytes),
            ("vllm:num_requests_running", "Alias of autoglm_requests_running", load.running),
            ("vllm:num_requests_waiting", "Alias of autoglm_requests_waiting", load.waiting),
            ("vllm:kv_cache_usage_perc", "Share of key-value memory in use, 0 to 1", used),
        )
        for name, text, value in gauges:
            family = GaugeMetricFamily(name, text, labels=list(labels))
            family.add_metric(list(labels.values()), value)
            yield family
        tokens = CounterMetricFamily("autoglm_generated_tokens", "Tokens generated", labels=list(labels))
        tokens.add_metric(list(labels.values()), load.generated_tokens)
        yield tokens
        steps = CounterMetricFamily("autoglm_engine_steps", "Steps of the engine", labels=list(labels))
        steps.add_metric(list(labels.values()), load.steps)
        yield steps


def register(settings: WorkerSettings, worker: Worker, store: BlockStore) -> None:
    """Adds the collector to the process's metrics page."""
    REGISTRY.register(LoadCollector(settings, worker, store))
