"""Rules, dashboards and runbooks agree with each other; tests/mesh/test_prometheus.py shows that the metrics exist."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "deploy/observability"
RULES = HERE / "prometheus"
RUNBOOK = ROOT / "docs/operations.md"
RULE_FILES = ("envoy.yaml", "istio.yaml", "services.yaml", "alerts.yaml")
DASHBOARDS = sorted((HERE / "dashboards").glob("*.json"))
UNITS = {"short", "s", "percent", "percentunit", "reqps", "ops", "bytes", "Bps"}
"""Grafana's ids of the units that are used."""


def rules(*files: str) -> Iterator[dict[str, Any]]:
    for name in files:
        for group in yaml.safe_load((RULES / name).read_text())["groups"]:
            yield from group["rules"]


def anchors() -> dict[str, str]:
    """Anchor of every heading of the runbook, with the text below it."""
    parts = re.split(r"^#+ (.+)$", RUNBOOK.read_text(), flags=re.MULTILINE)
    return {
        re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-"): body
        for title, body in zip(parts[1::2], parts[2::2], strict=True)
    }


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("observability_generate", HERE / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not installed: make packages")
    return found


def test_promtool_accepts_every_rule(promtool: str) -> None:
    """Prometheus's own tool reads all rule files."""
    command = [promtool, "check", "rules", *(str(RULES / name) for name in RULE_FILES)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_fires_on_what_it_is_for_and_on_nothing_beside(promtool: str) -> None:
    """The unit tests of the alerts, on a simulated clock; and none of the alerts is without."""
    done = subprocess.run([promtool, "test", "rules", str(RULES / "alerts_test.yaml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    names = [case["name"] for case in yaml.safe_load((RULES / "alerts_test.yaml").read_text())["tests"]]
    alerts = {rule["alert"] for rule in rules("alerts.yaml")}
    assert set(names) == {f"{alert} {ends}" for alert in alerts for ends in ("fires", "stays silent")}


def test_every_alert_has_a_runbook_that_says_what_to_do() -> None:
    """The anchor exists, and below it are a line on what to look at and one on what to do."""
    known = anchors()
    for rule in rules("alerts.yaml"):
        notes = rule["annotations"]
        path, _, anchor = notes["runbook"].partition("#")
        assert path == "docs/operations.md"
        assert anchor == rule["alert"].lower() and anchor in known, f"{notes['runbook']} does not exist"
        assert "Look:" in known[anchor] and "Do:" in known[anchor], f"#{anchor} says too little"
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert "{{ $labels.cloud }}" in notes["summary"] or "{{ $labels.instance }}" in notes["summary"]


def test_a_real_istio_gives_the_same_names() -> None:
    """envoy.yaml and istio.yaml record the same series, so alerts and dashboards work on either."""
    envoy, istio = ([rule["record"] for rule in rules(name)] for name in ("envoy.yaml", "istio.yaml"))
    assert envoy == istio


def test_recorded_names_that_are_used_exist() -> None:
    """Every `autoglm:…` in an alert, a rule or a dashboard is recorded by some rule, and every recorded one is used."""
    recorded = {rule["record"] for rule in rules(*RULE_FILES) if "record" in rule}
    texts = [rule["expr"] for rule in rules(*RULE_FILES)] + [path.read_text() for path in DASHBOARDS]
    used = {name for text in texts for name in re.findall(r"\bautoglm:[a-z0-9_:]+", text)}
    assert used == recorded


def test_the_files_are_what_their_generator_writes() -> None:
    """Dashboards and the cluster's rules are not edited by hand."""
    module = generator()
    for board in module.ALL:
        name = board.uid.removeprefix("autoglm-")
        assert (HERE / f"dashboards/{name}.json").read_text() == module.text(board), "run generate.py"
    assert (HERE / "kubernetes/rules.yaml").read_text() == module.prometheus_rule(), "run generate.py"


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_is_one_that_grafana_can_import(path: Path) -> None:
    """A data source to choose, unique ids, panels that do not overlap, units Grafana knows, legends on every query."""
    board = json.loads(path.read_text())
    variables = {item["name"]: item for item in board["templating"]["list"]}
    assert board["schemaVersion"] >= 36 and board["uid"] and board["title"]
    assert variables["datasource"]["type"] == "datasource" and "cloud" in variables
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) >= 8
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        mine = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not mine & cells and at["x"] + at["w"] <= 24, panel["title"]
        cells |= mine
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            assert target["expr"] and target["legendFormat"] and target["refId"]
            assert set(re.findall(r"\$([a-z]+)", target["expr"])) <= variables.keys(), panel["title"]
        steps = [step["value"] for step in panel["fieldConfig"]["defaults"]["thresholds"]["steps"]]
        assert steps[0] is None and steps[1:] == sorted(steps[1:])


def test_pods_are_scraped_with_the_labels_the_rules_expect() -> None:
    """Both PodMonitors set cloud, service, instance and a job that the rules select."""
    for document in yaml.safe_load_all((HERE / "kubernetes/podmonitors.yaml").read_text()):
        (endpoint,) = document["spec"]["podMetricsEndpoints"]
        targets = {item["targetLabel"]: item for item in endpoint["relabelings"]}
        assert {"cloud", "service", "instance", "job"} == targets.keys()
        assert targets["job"]["replacement"].startswith("autoglm")
