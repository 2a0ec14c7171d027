"""The worker's gauges, under our names and under the names that pickers of vLLM servers scrape."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import REGISTRY, CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.sparse_inference.settings import WorkerSettings
from services.sparse_inference.worker import Worker


class LoadCollector(Collector):
    """Reads the loop's load when the page is fetched; nothing is updated in between."""

    def __init__(self, settings: WorkerSettings, worker: Worker) -> None:
        self._settings, self._worker = settings, worker

    def collect(self) -> Iterable[Metric]:
        load, capacity = self._worker.load(), self._worker.kv_capacity_bytes
        labels = {"model_name": self._settings.model_name}
        used = load.kv_used_bytes / capacity
        gauges = (
            ("autoglm_requests_running", "Requests being computed", load.running),
            ("autoglm_requests_waiting", "Requests queued", load.waiting),
            ("autoglm_kv_used_bytes", "Key-value pages that running requests hold", load.kv_used_bytes),
            ("autoglm_kv_capacity_bytes", "Key-value memory at most", capacity),
            ("autoglm_prefix_store_bytes", "Key-value blocks kept after their request", load.kv_kept_bytes),
            ("vllm:num_requests_running", "Alias of autoglm_requests_running", load.running),
            ("vllm:num_requests_waiting", "Alias of autoglm_requests_waiting", load.waiting),
            ("vllm:kv_cache_usage_perc", "Share of key-value memory in use, 0 to 1", used),
        )
        for name, text, value in gauges:
            family = GaugeMetricFamily(name, text, labels=list(labels))
            family.add_metric(list(labels.values()), value)
            yield family
        counters = (
            ("autoglm_generated_tokens", "Tokens generated", load.generated_tokens),
            (
                "autoglm_prefilled_tokens",
                "Rows of prefill computed, those computed again included",
                load.prefilled_tokens,
            ),
            ("autoglm_engine_steps", "Steps of the engine", load.steps),
            ("autoglm_preemptions", "Requests that stepped back for want of pages", load.preemptions),
            ("autoglm_draft_tokens", "Tokens guessed ahead", load.draft_tokens),
            ("autoglm_accepted_drafts", "Guessed tokens that were right", load.accepted_tokens),
        )
        for name, text, value in counters:
            counter = CounterMetricFamily(name, text, labels=list(labels))
            counter.add_metric(list(labels.values()), value)
            yield counter


def register(settings: WorkerSettings, worker: Worker) -> None:
    """Adds the collector to the process's metrics page."""
    REGISTRY.register(LoadCollector(settings, worker))
