"""The worker's gauges, under our names and under the names that pickers of vLLM servers scrape.

Values are read when the page is fetched; nothing is updated in between. Times and counts of single generations are in
`observation`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from prometheus_client.core import REGISTRY, CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.sparse_inference import observation
from services.sparse_inference.engines import skips
from services.sparse_inference.settings import WorkerSettings
from services.sparse_inference.worker import Worker


class LoadCollector(Collector):
    """Reads the loop's load."""

    def __init__(self, settings: WorkerSettings, worker: Worker) -> None:
        self._settings, self._worker = settings, worker

    def collect(self) -> Iterable[Metric]:
        load, capacity = self._worker.load(), self._worker.kv_capacity_bytes
        labels = {"model_name": self._settings.model_name}
        used = load.kv_used_bytes / capacity
        block_tokens = self._worker.executor.block_tokens
        blocks = self._worker.executor.page_count
        for name, text, value in (
            ("autoglm_requests_running", "Requests being computed", load.running),
            ("autoglm_requests_waiting", "Requests queued", load.waiting),
            ("autoglm_kv_used_bytes", "Key-value pages that running requests hold", load.kv_used_bytes),
            ("autoglm_kv_capacity_bytes", "Key-value memory at most", capacity),
            ("autoglm_kv_used_ratio", "Share of key-value memory in use, 0 to 1", used),
            ("autoglm_prefix_store_bytes", "Key-value blocks kept after their request", load.kv_kept_bytes),
            ("vllm:num_requests_running", "Alias of autoglm_requests_running", load.running),
            ("vllm:num_requests_waiting", "Alias of autoglm_requests_waiting", load.waiting),
            ("vllm:kv_cache_usage_perc", "Share of key-value memory in use, 0 to 1", used),
            ("vllm:gpu_cache_usage_perc", "Older name of vllm:kv_cache_usage_perc", used),
        ):
            yield _gauge(name, text, labels, value)
        info = labels | {"block_size": str(block_tokens), "num_gpu_blocks": str(blocks), "cache_dtype": "auto"}
        yield _gauge("vllm:cache_config_info", "Key-value blocks: tokens of one, and how many", info, 1)
        yield _gauge("autoglm_worker_info", "What this worker runs, and how", labels | self._how(), 1)
        adapters = {"max_lora": "0", "running_lora_adapters": "", "waiting_lora_adapters": ""}
        yield _gauge("vllm:lora_requests_info", "Adapters: none are served", adapters, 0)
        for name, text, value in (
            ("autoglm_generated_tokens", "Tokens generated", load.generated_tokens),
            ("autoglm_prefilled_tokens", "Rows of prefill computed, again computed ones too", load.prefilled_tokens),
            ("autoglm_engine_steps", "Steps of the engine", load.steps),
            ("autoglm_preemptions", "Requests that stepped back for want of pages", load.preemptions),
            ("autoglm_draft_tokens", "Tokens guessed ahead", load.draft_tokens),
            ("autoglm_accepted_drafts", "Guessed tokens that were right", load.accepted_tokens),
            ("vllm:generation_tokens", "Alias of autoglm_generated_tokens", load.generated_tokens),
            ("vllm:num_preemptions", "Requests put back to be recomputed", load.preemptions),
            ("vllm:spec_decode_num_drafts", "Guesses at next tokens", load.drafts),
            ("vllm:spec_decode_num_draft_tokens", "Tokens guessed", load.draft_tokens),
            ("vllm:spec_decode_num_accepted_tokens", "Tokens guessed right", load.accepted_tokens),
        ):
            yield _counter(name, text, labels, value)

    def _how(self) -> dict[str, str]:
        settings, variant = self._settings, self._worker.variant
        is_sparse = settings.executor == "native" and skips(settings, variant.architecture)
        return {
            "variant": variant.digest[:12],
            "version": settings.label_map.get("version", ""),
            "executor": settings.executor,
            "precision": settings.precision,
            "kv_precision": settings.kv_precision,
            "sparsity": "neurons" if is_sparse else "dense",
        }


class _Busy(Protocol):
    """What an ONNX model says about itself."""

    at_work: int
    served: int


class OnnxCollector(Collector):
    """Reads how busy an ONNX model is."""

    def __init__(self, settings: WorkerSettings, serving: _Busy) -> None:
        self._settings, self._serving = settings, serving

    def collect(self) -> Iterable[Metric]:
        labels = {"model_name": self._settings.model_name}
        running = min(self._serving.at_work, self._settings.onnx_runs)
        waiting = self._serving.at_work - running
        for name, text, value in (
            ("autoglm_requests_running", "Requests being computed", running),
            ("autoglm_requests_waiting", "Requests queued", waiting),
            ("vllm:num_requests_running", "Alias of autoglm_requests_running", running),
            ("vllm:num_requests_waiting", "Alias of autoglm_requests_waiting", waiting),
        ):
            yield _gauge(name, text, labels, value)
        yield _counter("autoglm_inferences", "Requests answered", labels, self._serving.served)


def register(settings: WorkerSettings, worker: Worker) -> None:
    """Adds the collector to the process's metrics page."""
    REGISTRY.register(LoadCollector(settings, worker))
    observation.prepare(settings.model_name)


def register_onnx(settings: WorkerSettings, serving: _Busy) -> None:
    """The same for a worker that serves an ONNX model."""
    REGISTRY.register(OnnxCollector(settings, serving))


def _gauge(name: str, text: str, labels: Mapping[str, str], value: float) -> Metric:
    family = GaugeMetricFamily(name, text, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def _counter(name: str, text: str, labels: Mapping[str, str], value: float) -> Metric:
    family = CounterMetricFamily(name, text, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family
