"""The figures of `autoglm top`, computed from two looks at the metrics pages of a mesh. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from autoglm.cli.meshes import Sample

FIRST_TOKEN = "gen_ai_server_time_to_first_token_seconds_bucket"
WHOLE = "gen_ai_server_request_duration_seconds_bucket"
BETWEEN = "vllm:inter_token_latency_seconds_bucket"

Pages = Mapping[str, tuple[Sample, ...]]
"""By process."""


@dataclass(frozen=True, slots=True)
class Look:
    """What a mesh said at one moment (seconds of a monotonic clock). `unanswered` are processes without an answer."""

    at_s: float
    pages: Pages
    unanswered: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Worker:
    """One worker's line. Shares are 0 to 1; None is "cannot be said", such as a share of nothing."""

    name: str
    model: str
    version: str
    variant: str
    precision: str
    sparsity: str
    tokens_per_s: float
    running: float
    waiting: float
    kv_used: float | None
    prefix_hits: float | None


@dataclass(frozen=True, slots=True)
class Cloud:
    """One cloud's line and what hangs below it. Latencies in seconds; of the window, or since the start without any."""

    name: str
    phase: str
    requests_per_s: float = 0.0
    errors_per_s: float = 0.0
    tokens_per_s: float = 0.0
    running: float = 0.0
    waiting: float = 0.0
    cache_hits: float | None = None
    fallbacks: float = 0.0
    first_token_p50_s: float | None = None
    first_token_p99_s: float | None = None
    request_p50_s: float | None = None
    request_p99_s: float | None = None
    between_tokens_p50_s: float | None = None
    between_tokens_p99_s: float | None = None
    workers: tuple[Worker, ...] = ()
    weights: tuple[Mapping[str, Any], ...] = ()
    policy: str = ""
    unanswered: tuple[str, ...] = field(default=())


def cloud(name: str, phase: str, policy: Mapping[str, Any], before: Look, now: Look) -> Cloud:
    """The figures of the time between the two looks."""
    span = max(now.at_s - before.at_s, 1e-9)
    every = [sample for page in now.pages.values() for sample in page]
    grown = [sample for process in now.pages for sample in _grown(before.pages.get(process, ()), now.pages[process])]
    ended = [sample for sample in grown if sample.name == "gen_ai_server_request_duration_seconds_count"]
    latencies = {
        f"{label}_{which}_s": quantile(share, _buckets(grown, metric)) or quantile(share, _buckets(every, metric))
        for label, metric in (("first_token", FIRST_TOKEN), ("request", WHOLE), ("between_tokens", BETWEEN))
        for which, share in (("p50", 0.5), ("p99", 0.99))
    }
    return Cloud(
        name=name,
        phase=phase,
        requests_per_s=sum(sample.value for sample in ended) / span,
        errors_per_s=sum(s.value for s in ended if s.labels.get("error_type") not in ("", "CANCELLED")) / span,
        tokens_per_s=total(grown, "autoglm_generated_tokens_total") / span,
        running=total(every, "autoglm_requests_running"),
        waiting=total(every, "autoglm_requests_waiting"),
        cache_hits=share(total(every, "vllm:prefix_cache_hits_total"), total(every, "vllm:prefix_cache_queries_total")),
        fallbacks=total(every, "autoglm_fallback_total"),
        workers=tuple(
            _worker(process, page, _grown(before.pages.get(process, ()), page), span)
            for process, page in now.pages.items()
            if any(sample.name == "autoglm_requests_running" for sample in page)
        ),
        weights=tuple(policy.get("weights", ())),
        policy=str(policy.get("version", "")),
        unanswered=now.unanswered,
        **latencies,
    )


def total(samples: Iterable[Sample], name: str) -> float:
    """The sum over all labels."""
    return sum(sample.value for sample in samples if sample.name == name)


def share(part: float, whole: float) -> float | None:
    """None of nothing."""
    return part / whole if whole else None


def quantile(wanted: float, buckets: Mapping[float, float]) -> float | None:
    """As Prometheus estimates it: linear within a bucket of cumulative counts; the last finite bound above that."""
    bounds = sorted(buckets)
    if not bounds or not (count := buckets[bounds[-1]]) > 0:
        return None
    rank, low, under = wanted * count, 0.0, 0.0
    for bound in bounds:
        if buckets[bound] >= rank:
            if bound == float("inf"):
                return low
            inside = buckets[bound] - under
            return low + (bound - low) * ((rank - under) / inside if inside else 1.0)
        low, under = bound, buckets[bound]
    return low


def _worker(name: str, page: tuple[Sample, ...], grown: list[Sample], span: float) -> Worker:
    about = next((sample.labels for sample in page if sample.name == "autoglm_worker_info"), {})
    served = [sample.labels.get("model_name", "") for sample in page if sample.name == "autoglm_requests_running"]
    return Worker(
        name=name,
        model=served[0],
        version=about.get("version", ""),
        variant=about.get("variant", ""),
        precision=about.get("precision", ""),
        sparsity=about.get("sparsity", ""),
        tokens_per_s=total(grown, "autoglm_generated_tokens_total") / span,
        running=total(page, "autoglm_requests_running"),
        waiting=total(page, "autoglm_requests_waiting"),
        kv_used=share(total(page, "autoglm_kv_used_bytes"), total(page, "autoglm_kv_capacity_bytes")),
        prefix_hits=share(total(page, "vllm:prefix_cache_hits_total"), total(page, "vllm:prefix_cache_queries_total")),
    )


def _grown(before: Iterable[Sample], now: Iterable[Sample]) -> list[Sample]:
    """By how much each series grew; one that fell is of a process that began anew, so all of it is new."""
    old = {(sample.name, tuple(sorted(sample.labels.items()))): sample.value for sample in before}
    grown = []
    for sample in now:
        was = old.get((sample.name, tuple(sorted(sample.labels.items()))), 0.0)
        grown.append(Sample(sample.name, sample.labels, sample.value - was if sample.value >= was else sample.value))
    return grown


def _buckets(samples: Iterable[Sample], name: str) -> dict[float, float]:
    found: dict[float, float] = {}
    for sample in samples:
        if sample.name == name:
            bound = float(sample.labels["le"])
            found[bound] = found.get(bound, 0.0) + sample.value
    return found
