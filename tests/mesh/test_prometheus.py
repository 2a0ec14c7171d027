"""A real Prometheus scrapes a real mesh under a little load: every rule and every dashboard query has an answer."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import autoglm
import pytest
import yaml

from benchmarks import harness
from benchmarks.harness import MODEL, Mesh
from services.mesh import demo, scrape
from tests.fakes import prometheus_server
from tests.fakes.prometheus_server import Prometheus

pytestmark = pytest.mark.timeout(180)
ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / scrape.RULES
PATIENCE_S = 60.0
INTERVAL_S = 0.5
ONLY_WITH_TLS = {"envoy_listener_ssl_certificate_expiration_unix_time_seconds"}
WORDS = set("by on or and sum max min rate increase changes count time ignoring group_left histogram_quantile".split())


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with harness.running() as started:
        yield started


@pytest.fixture(scope="module")
def prometheus(mesh: Mesh, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Configured by the verb that people use."""
    command = [sys.executable, "-m", "services.mesh", "prometheus", "--interval-s", str(INTERVAL_S)]
    environment = os.environ | {"AUTOGLM_RUN_DIR": str(mesh.directory.root)}
    subprocess.run(command, env=environment, check=True, capture_output=True, cwd=ROOT)
    folder = tmp_path_factory.mktemp("prometheus")
    with prometheus_server.running(mesh.directory.root / "prometheus/prometheus.yml", folder) as started:
        yield started


def rules(kind: str) -> Iterator[dict[str, Any]]:
    for name in scrape.RULE_FILES:
        for group in yaml.safe_load((RULES / name).read_text())["groups"]:
            yield from (rule for rule in group["rules"] if kind in rule)


def queries() -> dict[str, str]:
    """Every recorded name, every alert's parts that must have data, and every dashboard query, by where it is from."""
    found = {f"rule {rule['record']}": str(rule["record"]) for rule in rules("record")}
    for path in sorted((ROOT / "deploy/observability/dashboards").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                chosen = re.sub(r"\$(cloud|service|model)\b", ".*", target["expr"])
                found[f"{path.stem}: {panel['title']} {target['refId']}"] = chosen
    return found


def load(mesh: Mesh, until: Callable[[], bool], what: str) -> None:
    """Sends small requests, one after the other, until the condition holds."""
    deadline, number = time.monotonic() + PATIENCE_S, 0
    with autoglm.Client(mesh.ingress, model=MODEL) as client:
        while not until():
            assert time.monotonic() < deadline, what
            number += 1
            client.generate(f"import os  # {number % 3}\n", max_tokens=24, ignore_eos=True)


def test_every_page_is_scraped(mesh: Mesh, prometheus: Prometheus) -> None:
    """All processes, the supervisor and Envoy are up, under the names that the mesh itself uses."""
    expected = {process.name for process in mesh.state.processes} | {"mesh"}
    load(mesh, lambda: {s["metric"]["instance"] for s in prometheus.query("up == 1")} == expected, f"up: {expected}")
    assert {sample["metric"]["cloud"] for sample in prometheus.query("up")} == {"local"}


def test_every_rule_and_every_dashboard_query_has_an_answer(mesh: Mesh, prometheus: Prometheus) -> None:
    """None is empty under load: what has never happened is a zero, not nothing. And no healthy mesh rings an alarm."""
    waiting = queries()

    def answered() -> bool:
        for name in [name for name, query in waiting.items() if prometheus.query(query)]:
            del waiting[name]
        return not waiting

    load(mesh, answered, "no data")
    assert waiting == {}
    assert prometheus.query('ALERTS{alertstate="firing"}') == []
    assert prometheus.value("autoglm:door_errors:ratio_rate5m") == 0
    broken = [rule for group in prometheus.ask("rules")["groups"] for rule in group["rules"] if rule["health"] == "err"]
    assert broken == []


def test_every_metric_that_is_named_is_exported(mesh: Mesh, prometheus: Prometheus) -> None:
    """A rule on a metric that nobody exports would be silent for ever."""
    texts = [rule["expr"] for kind in ("record", "alert") for rule in rules(kind)] + list(queries().values())
    named = set()
    for text in texts:
        bare = re.sub(r'"[^"]*"', "", re.sub(r"\b(by|on|group_left|ignoring) \([^)]*\)", "", text))
        named |= set(re.findall(r"(?<![\w:{,])([a-z][a-z0-9_:]*[a-z0-9])(?=[{\[]|\s|\)|$)", bare))
    named = {name for name in named if not name.startswith("autoglm:")} - WORDS - ONLY_WITH_TLS
    exported = set(prometheus.ask("metadata")) | set(prometheus.ask("label/__name__/values"))
    missing = {name for name in named if name not in exported}
    missing -= {name for name in missing if re.sub(r"_(bucket|count|sum)$", "", name) in exported}
    assert len(named) > 40
    assert missing == set()


def test_statuses_are_counted_by_method(mesh: Mesh, prometheus: Prometheus) -> None:
    """A call that fails is seen with its method and its gRPC status, and as nobody's fault but the caller's."""
    query = 'envoy_cluster_grpc{grpc_method="autoglm.gateway.v1.GatewayService.Generate",grpc_status="5"}'
    with autoglm.Client(mesh.ingress) as client, pytest.raises(autoglm.AutoglmError):
        client.generate("x", model="nobody", max_tokens=1)
    load(mesh, lambda: bool(prometheus.query(query)), "NOT_FOUND was not counted")
    assert prometheus.value("autoglm:door_errors:rate5m") == 0


async def test_a_refused_edit_rings_and_its_correction_ends_it(mesh: Mesh, prometheus: Prometheus) -> None:
    """The alert fires while the newest edit is not in force, and no longer."""
    firing = 'ALERTS{alertname="PolicyIsRefused",alertstate="firing"}'
    mesh.edit("telemetry.yaml", lambda text: text.replace("randomSamplingPercentage: 100", "randomSampling: 100"))
    await mesh.until(lambda: bool(prometheus.query(firing)), "the alert")
    mesh.edit("telemetry.yaml", lambda text: text.replace("randomSampling: 100", "randomSamplingPercentage: 100"))
    await mesh.until(lambda: not prometheus.query(firing), "its end")


async def test_what_failed_is_logged_within_its_trace(mesh: Mesh) -> None:
    """The collector gets an access log record of the failed request, under the request's trace, with its status."""
    with autoglm.Client(mesh.ingress) as client, pytest.raises(autoglm.AutoglmError) as caught:
        client.generate("x", model="nobody-again", max_tokens=1)
    trace_id = caught.value.trace_id
    assert trace_id

    def logs() -> list[dict[str, Any]]:
        try:
            with urllib.request.urlopen(f"http://{mesh.state.addresses.traces}/traces/{trace_id}", timeout=5) as page:
                found: list[dict[str, Any]] = json.load(page)["logs"]
        except urllib.error.HTTPError:  # nothing of it has come yet
            return []
        return found

    passed = {"envoy-ingress", "envoy-gateway~inbound|50051||"}  # the door, and the sidecar before the gateway
    await mesh.until(lambda: {log["service"] for log in logs()} == passed, "a log record of each")
    assert {log["attributes"]["grpc_status"] for log in logs()} == {"NotFound"}


async def test_publishing_blocks_makes_no_traces(mesh: Mesh) -> None:
    """Background calls, one for every few tokens, are in no trace; those that a request waits for are."""
    workers = mesh.processes("sparse-inference")
    prompt = "def a_function_with_a_rather_long_name_that_no_cache_has_seen(x, y, z):\n    return x + y + z\n" * 3
    async with autoglm.AsyncClient(mesh.ingress) as client:
        done = await client.generate(prompt, model=MODEL, max_tokens=40, ignore_eos=True)

    def published() -> bool:
        return sum(mesh.metric(worker, "autoglm_published_blocks_total", outcome="stored") for worker in workers) >= 2

    def names() -> set[str]:
        try:
            return {span["name"] for span in mesh.trace(done.trace_id)}
        except urllib.error.HTTPError:
            return set()

    await mesh.until(published, "published blocks")
    await mesh.until(lambda: "fetch prefix" in names(), "the request's own trace")
    newest = await asyncio.to_thread(demo.newest, mesh.state.addresses.traces, 1000)
    roots = {trace["name"] for trace in newest}
    assert roots and not any("CacheService" in name or "cache" in name for name in roots), roots
