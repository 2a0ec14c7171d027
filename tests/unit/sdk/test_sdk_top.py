"""The arithmetic of `autoglm top`, and the reading of pages and state files: no mesh is needed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from autoglm import UnavailableError
from autoglm.cli import figures, meshes
from autoglm.cli.figures import Look
from autoglm.cli.meshes import Sample, samples

WORKER = """# HELP autoglm_requests_running Requests being computed
# TYPE autoglm_requests_running gauge
autoglm_requests_running{{model_name="m"}} 2.0
autoglm_requests_waiting{{model_name="m"}} 3.0
autoglm_kv_used_bytes{{model_name="m"}} 25.0
autoglm_kv_capacity_bytes{{model_name="m"}} 1.0e+02
autoglm_generated_tokens_total{{model_name="m"}} {tokens}
vllm:prefix_cache_queries_total{{model_name="m"}} 0.0
autoglm_worker_info{{model_name="m",sparsity="neurons",precision="int8",version="v1",variant="abc"}} 1.0
"""
GATEWAY = """gen_ai_server_request_duration_seconds_count{{error_type=""}} {good}
gen_ai_server_request_duration_seconds_count{{error_type="INTERNAL"}} {bad}
gen_ai_server_request_duration_seconds_count{{error_type="CANCELLED"}} {bad}
gen_ai_server_time_to_first_token_seconds_bucket{{le="0.1"}} {good}
gen_ai_server_time_to_first_token_seconds_bucket{{le="+Inf"}} {good}
"""


def look(at_s: float, tokens: int, good: int, bad: int) -> Look:
    pages = {"w": WORKER.format(tokens=tokens), "gateway": GATEWAY.format(good=good, bad=bad)}
    return Look(at_s, {name: tuple(samples(page)) for name, page in pages.items()})


def test_rates_are_those_between_two_looks() -> None:
    """Tokens, requests and failures a second; who cancels has not met a failure; gauges are as of now."""
    seen = figures.cloud("aws", "up", {"version": "v", "weights": []}, look(10, 100, 4, 0), look(12, 300, 12, 1))
    assert (seen.tokens_per_s, seen.requests_per_s, seen.errors_per_s) == (100, 5, 0.5)
    assert (seen.running, seen.waiting) == (2, 3)
    (worker,) = seen.workers
    assert (worker.model, worker.sparsity, worker.precision, worker.kv_used) == ("m", "neurons", "int8", 0.25)
    assert worker.prefix_hits is None, "a share of nothing is not 0 %"
    assert seen.first_token_p99_s == pytest.approx(0.099)


def test_a_process_that_began_anew_does_not_make_negative_rates() -> None:
    """Its counters fell; all they say now is new."""
    seen = figures.cloud("aws", "up", {}, look(0, 1000, 50, 0), look(1, 30, 2, 0))
    assert (seen.tokens_per_s, seen.requests_per_s) == (30, 2)


def test_without_traffic_latencies_are_those_since_the_start() -> None:
    """An idle mesh still says how fast it was, and one that has served nothing says nothing."""
    still = look(0, 10, 8, 0)
    assert figures.cloud("aws", "up", {}, still, still).first_token_p50_s == pytest.approx(0.05)
    none = look(0, 0, 0, 0)
    assert figures.cloud("aws", "up", {}, none, none).first_token_p50_s is None


@pytest.mark.parametrize(
    ("share", "buckets", "expected"),
    [
        (0.5, {1.0: 10, 2.0: 20, float("inf"): 20}, 1.0),
        (0.75, {1.0: 10, 2.0: 20, float("inf"): 20}, 1.5),
        (0.99, {1.0: 10, float("inf"): 20}, 1.0),
        (0.5, {1.0: 0, float("inf"): 0}, None),
        (0.5, {}, None),
    ],
)
def test_quantiles_are_prometheuss(share: float, buckets: dict[float, float], expected: float | None) -> None:
    """Linear within a bucket, the last finite bound beyond it, nothing of nothing."""
    assert figures.quantile(share, buckets) == expected


def test_pages_are_read_leniently() -> None:
    """Escaped quotes and braces in labels survive; what is no sample is passed over."""
    page = 'a{x="1,y",z="}"} 2\nb 3e1 1700000\n\nnonsense\nc{x="q\\"} 1"} NaN\nd one\n'
    assert list(samples(page))[:2] == [Sample("a", {"x": "1,y", "z": "}"}, 2.0), Sample("b", {}, 30.0)]
    assert [sample.name for sample in samples(page)] == ["a", "b", "c"]


def test_clouds_are_found_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`.run` and `.run/clouds/*`; a named directory without a mesh is an error that names it; a dead pid is told."""
    state = {"phase": "up", "pid": os.getpid(), "addresses": {}, "processes": [], "policy": {}}
    monkeypatch.setenv("AUTOGLM_RUN_DIR", str(tmp_path))
    with pytest.raises(UnavailableError, match="make run"):
        meshes.find([])
    for name, pid in (("aws", os.getpid()), ("gcp", 2**22 + 1)):
        (tmp_path / "clouds" / name).mkdir(parents=True)
        (tmp_path / "clouds" / name / "state.json").write_text(json.dumps(state | {"pid": pid}))
    (tmp_path / "clouds" / "azure").mkdir()
    assert [(item.cloud, item.phase) for item in meshes.find([])] == [("aws", "up"), ("gcp", "gone")]
    with pytest.raises(UnavailableError, match="azure"):
        meshes.find([tmp_path / "clouds" / "azure"])
