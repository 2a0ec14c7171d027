"""Grafana dashboards from a few lines each: `python deploy/observability/generate.py` writes dashboards/*.json.

It also writes kubernetes/rules.yaml: the rules for a real Istio as one PrometheusRule.

A panel is a title, a unit, queries with legends, and thresholds where a promise of docs/operations.md has one. The JSON
is committed, as people import it; a test holds it against this file and evaluates every query on a real Prometheus.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
CLUSTER_RULES = ("istio.yaml", "services.yaml", "alerts.yaml")
COLUMNS, WIDTH, HEIGHT = 24, 8, 8
CLOUD = 'cloud=~"$cloud"'
SERVICE = 'cloud=~"$cloud",service=~"$service"'
MODEL = 'cloud=~"$cloud",model=~"$model"'
MODEL_NAME = 'cloud=~"$cloud",model_name=~"$model"'


@dataclass(frozen=True, slots=True)
class Panel:
    """One diagram. `warn` and `bad` colour the values from there on; `kind` is Grafana's panel type."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    about: str = ""
    warn: float | None = None
    bad: float | None = None
    kind: str = "timeseries"


@dataclass(frozen=True, slots=True)
class Dashboard:
    """One page. `variables` are names of label values to choose from, beside the data source."""

    uid: str
    title: str
    about: str
    variables: tuple[str, ...]
    panels: tuple[Panel, ...]


VARIABLES = {
    "cloud": 'label_values(up{job=~"autoglm.*"}, cloud)',
    "service": 'label_values(up{job=~"autoglm.*",cloud=~"$cloud"}, service)',
    "model": 'label_values(autoglm_worker_info{cloud=~"$cloud"}, model_name)',
}

OVERVIEW = Dashboard(
    "autoglm-overview",
    "AutoGLM / Overview",
    "Are requests answered, how fast, and is there room for more. Start here.",
    ("cloud", "model"),
    (
        Panel("Requests at the door", "reqps", ((f"autoglm:door_requests:rate5m{{{CLOUD}}}", "{{cloud}}"),)),
        Panel(
            "Requests that fail",
            "percentunit",
            (
                (f"autoglm:door_errors:ratio_rate5m{{{CLOUD}}}", "{{cloud}} 5 min"),
                (f"autoglm:door_errors:ratio_rate1h{{{CLOUD}}}", "{{cloud}} 1 h"),
            ),
            "What the mesh owes: UNKNOWN, DEADLINE_EXCEEDED, INTERNAL, UNAVAILABLE, DATA_LOSS, HTTP 5xx.",
            warn=0.001,
            bad=0.0144,
        ),
        Panel(
            "Requests turned away for load",
            "reqps",
            ((f"autoglm:door_shed:rate5m{{{CLOUD}}}", "{{cloud}}"),),
            "RESOURCE_EXHAUSTED and HTTP 429.",
        ),
        Panel(
            "Time to first token",
            "s",
            (
                (f"autoglm:first_token_seconds:p50{{{MODEL}}}", "{{cloud}} {{model}} p50"),
                (f"autoglm:first_token_seconds:p99{{{MODEL}}}", "{{cloud}} {{model}} p99"),
            ),
            "From the gateway's request to its first token.",
            warn=1,
            bad=2.5,
        ),
        Panel(
            "Time between tokens",
            "s",
            (
                (f"autoglm:inter_token_seconds:p50{{{MODEL}}}", "{{cloud}} {{model}} p50"),
                (f"autoglm:inter_token_seconds:p99{{{MODEL}}}", "{{cloud}} {{model}} p99"),
            ),
            warn=0.1,
            bad=0.3,
        ),
        Panel("Tokens a second", "short", ((f"autoglm:generated_tokens:rate1m{{{MODEL}}}", "{{cloud}} {{model}}"),)),
        Panel(
            "Requests at work and waiting",
            "short",
            (
                (f"autoglm:requests_running:sum{{{CLOUD}}}", "{{cloud}} running"),
                (f"autoglm:requests_waiting:sum{{{CLOUD}}}", "{{cloud}} waiting"),
            ),
        ),
        Panel(
            "How generations end", "ops", ((f"autoglm:generations:rate5m{{{CLOUD}}}", "{{cloud}} {{finish_reason}}"),)
        ),
        Panel(
            "Fallbacks",
            "ops",
            ((f"autoglm:fallbacks:rate5m{{{CLOUD}}}", "{{cloud}} {{service}} {{kind}}"),),
            "Whatever was done other than asked; zero is healthy.",
            warn=0.01,
        ),
        Panel(
            "Workers",
            "short",
            ((f"autoglm:replicas:sum{{{CLOUD}}}", "{{cloud}}"),),
            "With a lease at the scheduler.",
            kind="stat",
        ),
        Panel(
            "Pages that answer",
            "short",
            ((f'count by (cloud) (up{{job=~"autoglm.*",{CLOUD}}} == 1)', "{{cloud}}"),),
            kind="stat",
        ),
        Panel(
            "Certificate life left",
            "s",
            ((f"autoglm:certificate_seconds_left:min{{{CLOUD}}}", "{{cloud}}"),),
            "Centuries where there is no TLS.",
            kind="stat",
        ),
    ),
)

WORKERS = Dashboard(
    "autoglm-workers",
    "AutoGLM / Workers and engine",
    "What each worker does: tokens, queue, key-value memory, prefixes, drafts.",
    ("cloud", "model"),
    (
        Panel(
            "What runs",
            "short",
            (
                (
                    f"autoglm_worker_info{{{MODEL_NAME}}}",
                    "{{instance}} {{version}} {{precision}} {{sparsity}} {{variant}}",
                ),
            ),
            "Model, variant, number format, sparsity.",
            kind="table",
        ),
        Panel(
            "Tokens a second",
            "short",
            (
                (f"rate(autoglm_generated_tokens_total{{{MODEL_NAME}}}[1m])", "{{instance}} generated"),
                (f"rate(autoglm_prefilled_tokens_total{{{MODEL_NAME}}}[1m])", "{{instance}} prefilled"),
            ),
        ),
        Panel("Running", "short", ((f"autoglm_requests_running{{{MODEL_NAME}}}", "{{instance}}"),)),
        Panel("Waiting", "short", ((f"autoglm_requests_waiting{{{MODEL_NAME}}}", "{{instance}}"),), warn=4, bad=8),
        Panel(
            "Key-value memory in use",
            "percentunit",
            ((f"autoglm:kv_used:ratio{{{MODEL_NAME}}}", "{{instance}}"),),
            "By running requests.",
            warn=0.8,
            bad=0.95,
        ),
        Panel(
            "Key-value memory kept for prefixes",
            "bytes",
            ((f"autoglm_prefix_store_bytes{{{MODEL_NAME}}}", "{{instance}}"),),
        ),
        Panel(
            "Prompt found in caches",
            "percentunit",
            (
                (f"autoglm:prefix_hits:ratio_rate5m{{{CLOUD}}}", "{{cloud}} found"),
                (f"autoglm:prefix_forecast:ratio_rate5m{{{CLOUD}}}", "{{cloud}} forecast by the scheduler"),
            ),
        ),
        Panel(
            "Blocks at the cache service", "ops", ((f"autoglm:cache_blocks:rate5m{{{CLOUD}}}", "{{cloud}} {{result}}"),)
        ),
        Panel(
            "Cache in use",
            "bytes",
            (
                (f"sum by (cloud, tier) (autoglm_cache_used_bytes{{{CLOUD}}})", "{{cloud}} {{tier}}"),
                (f"sum by (cloud, tier) (autoglm_cache_capacity_bytes{{{CLOUD}}})", "{{cloud}} {{tier}} at most"),
            ),
        ),
        Panel(
            "Guessed tokens that were right",
            "percentunit",
            (
                (
                    f"rate(autoglm_accepted_drafts_total{{{MODEL_NAME}}}[5m])"
                    f" / (rate(autoglm_draft_tokens_total{{{MODEL_NAME}}}[5m]) > 0)"
                    f" or 0 * autoglm_requests_running{{{MODEL_NAME}}}",
                    "{{instance}}",
                ),
            ),
        ),
        Panel(
            "Steps of the engine", "ops", ((f"rate(autoglm_engine_steps_total{{{MODEL_NAME}}}[1m])", "{{instance}}"),)
        ),
        Panel(
            "Requests that stepped back",
            "ops",
            ((f"rate(autoglm_preemptions_total{{{MODEL_NAME}}}[5m])", "{{instance}}"),),
            "For want of pages; they are computed again.",
            warn=0.1,
        ),
    ),
)

MESH = Dashboard(
    "autoglm-mesh",
    "AutoGLM / Mesh and Envoy",
    "Calls between services by method and status, retries, ejection, the picker, the policy in force.",
    ("cloud", "service"),
    (
        Panel(
            "Calls by method",
            "reqps",
            (
                (
                    f"sum by (cloud, destination, method) (autoglm:mesh_calls:rate5m{{{CLOUD}}})",
                    "{{destination}} {{method}}",
                ),
            ),
        ),
        Panel(
            "Calls by gRPC status",
            "reqps",
            (
                (
                    f"sum by (cloud, destination, grpc_status) (autoglm:mesh_calls:rate5m{{{CLOUD}}})",
                    "{{destination}} {{grpc_status}}",
                ),
            ),
        ),
        Panel(
            "Time of calls at the services, p99",
            "s",
            (
                (
                    f"histogram_quantile(0.99, sum by (cloud, service, method, le)"
                    f" (rate(autoglm_rpc_duration_seconds_bucket{{{SERVICE}}}[5m]))) >= 0"
                    f" or 0 * sum by (cloud, service) (up{{{SERVICE}}})",
                    "{{service}} {{method}}",
                ),
            ),
            "Streams count until their end.",
        ),
        Panel(
            "Calls at work",
            "short",
            (
                (
                    f"sum by (cloud, service) (autoglm_rpc_in_flight{{{SERVICE}}})"
                    f" or 0 * sum by (cloud, service) (up{{{SERVICE}}})",
                    "{{cloud}} {{service}}",
                ),
            ),
        ),
        Panel(
            "Calls tried again",
            "percentunit",
            ((f"autoglm:mesh_retries:ratio_rate5m{{{CLOUD}}}", "{{cloud}}"),),
            warn=0.02,
            bad=0.1,
        ),
        Panel("Ejected endpoints", "short", ((f"autoglm:ejected_endpoints:sum{{{CLOUD}}}", "{{cloud}}"),), warn=1),
        Panel(
            "Healthy endpoints",
            "short",
            (
                (
                    f"sum by (cloud, cluster_name)"
                    f' (envoy_cluster_membership_healthy{{{CLOUD},cluster_name=~".*outbound.*"}})',
                    "{{cluster_name}}",
                ),
            ),
        ),
        Panel(
            "Picker: decisions",
            "ops",
            (
                (
                    f"sum by (cloud, outcome) (rate(autoglm_scheduler_decisions_total{{{CLOUD}}}[5m]))",
                    "{{cloud}} {{outcome}}",
                ),
                (f"autoglm:picker_bypassed:rate5m{{{CLOUD}}}", "{{cloud}} bypassed"),
            ),
        ),
        Panel(
            "Picker: time of a decision, p99",
            "s",
            (
                (
                    f"histogram_quantile(0.99, sum by (cloud, le)"
                    f" (rate(autoglm_scheduler_decision_seconds_bucket{{{CLOUD}}}[5m])))",
                    "{{cloud}}",
                ),
            ),
            bad=0.01,
        ),
        Panel(
            "Connections at the door",
            "short",
            ((f'envoy_http_downstream_cx_active{{{CLOUD},http_conn_manager_prefix="ingress"}}', "{{cloud}}"),),
        ),
        Panel(
            "Weights of the policy in force",
            "percent",
            ((f"autoglm_mesh_route_weight{{{CLOUD}}}", "{{cloud}} {{route}} → {{destination}}"),),
        ),
        Panel("Policy edits refused", "short", ((f"autoglm:policy_refusals:recent{{{CLOUD}}}", "{{cloud}}"),), bad=1),
        Panel(
            "Restarts",
            "short",
            ((f"autoglm:restarts:changes15m{{{SERVICE}}}", "{{cloud}} {{service}}"),),
            "Starts in 15 minutes.",
            warn=1,
            bad=3,
        ),
        Panel(
            "Processor time",
            "percentunit",
            (
                (
                    f"sum by (cloud, service) (rate(process_cpu_seconds_total{{{SERVICE}}}[1m]))"
                    f" or 0 * sum by (cloud, service) (up{{{SERVICE}}})",
                    "{{cloud}} {{service}}",
                ),
            ),
            "1 is one core.",
        ),
        Panel(
            "Memory",
            "bytes",
            (
                (
                    f"sum by (cloud, service) (process_resident_memory_bytes{{{SERVICE}}})"
                    f" or sum by (cloud, service) (envoy_server_memory_allocated{{{SERVICE}}})"
                    f" or 0 * sum by (cloud, service) (up{{{SERVICE}}})",
                    "{{cloud}} {{service}}",
                ),
            ),
        ),
    ),
)

CLOUDS = Dashboard(
    "autoglm-clouds",
    "AutoGLM / Clouds",
    "The clouds side by side: who carries the load, who fails, who may help whom.",
    ("cloud",),
    (
        Panel(
            "Share of all requests",
            "percentunit",
            (
                (
                    f"autoglm:door_requests:rate5m{{{CLOUD}}}"
                    f" / on () group_left () (sum(autoglm:door_requests:rate5m) > 0)",
                    "{{cloud}}",
                ),
            ),
        ),
        Panel(
            "Requests that fail",
            "percentunit",
            ((f"autoglm:door_errors:ratio_rate5m{{{CLOUD}}}", "{{cloud}}"),),
            warn=0.001,
            bad=0.0144,
        ),
        Panel(
            "Time to first token, p99",
            "s",
            ((f"max by (cloud) (autoglm:first_token_seconds:p99{{{CLOUD}}})", "{{cloud}}"),),
            warn=1,
            bad=2.5,
        ),
        Panel(
            "Tokens a second", "short", ((f"sum by (cloud) (autoglm:generated_tokens:rate1m{{{CLOUD}}})", "{{cloud}}"),)
        ),
        Panel(
            "Requests for each worker",
            "short",
            (
                (
                    f"(autoglm:requests_running:sum{{{CLOUD}}} + autoglm:requests_waiting:sum{{{CLOUD}}})"
                    f" / (autoglm:replicas:sum{{{CLOUD}}} > 0)",
                    "{{cloud}}",
                ),
            ),
            "The room that is left to take over from another cloud.",
        ),
        Panel(
            "Key-value memory in use, fullest worker",
            "percentunit",
            ((f"max by (cloud) (autoglm:kv_used:ratio{{{CLOUD}}})", "{{cloud}}"),),
            warn=0.8,
            bad=0.95,
        ),
        Panel("Workers", "short", ((f"autoglm:replicas:sum{{{CLOUD}}}", "{{cloud}}"),)),
        Panel(
            "Pages that do not answer",
            "short",
            (
                (
                    f'count by (cloud) (up{{job=~"autoglm.*",{CLOUD}}} == 0)'
                    f' or 0 * count by (cloud) (up{{job=~"autoglm.*",{CLOUD}}})',
                    "{{cloud}}",
                ),
            ),
            bad=1,
        ),
        Panel(
            "Traffic leaving each proxy",
            "Bps",
            (
                (
                    f"sum by (cloud, cluster_name)"
                    f' (rate(envoy_cluster_upstream_cx_tx_bytes_total{{{CLOUD},cluster_name=~".*outbound.*"}}[5m]))',
                    "{{cloud}} {{cluster_name}}",
                ),
            ),
        ),
        Panel(
            "Balancing in panic",
            "ops",
            ((f"sum by (cloud) (rate(envoy_cluster_lb_healthy_panic{{{CLOUD}}}[5m]))", "{{cloud}}"),),
            "Without regard to health, because too few endpoints are healthy.",
        ),
        Panel("Fallbacks", "ops", ((f"sum by (cloud) (autoglm:fallbacks:rate5m{{{CLOUD}}})", "{{cloud}}"),), warn=0.01),
        Panel("Certificate life left", "s", ((f"autoglm:certificate_seconds_left:min{{{CLOUD}}}", "{{cloud}}"),)),
    ),
)

ALL = (OVERVIEW, WORKERS, MESH, CLOUDS)


def render(board: Dashboard) -> dict[str, Any]:
    """Grafana's JSON (schema version 39)."""
    return {
        "uid": board.uid,
        "title": board.title,
        "description": board.about,
        "tags": ["autoglm"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "timezone": "browser",
        "refresh": "15s",
        "time": {"from": "now-1h", "to": "now"},
        "annotations": {"list": []},
        "links": [{"type": "dashboards", "tags": ["autoglm"], "title": "AutoGLM", "asDropdown": True}],
        "templating": {"list": [_datasource(), *(_variable(name) for name in board.variables)]},
        "panels": [_panel(number, panel) for number, panel in enumerate(board.panels)],
    }


def text(board: Dashboard) -> str:
    """What the file holds."""
    return json.dumps(render(board), indent=1, ensure_ascii=False) + "\n"


def _datasource() -> dict[str, Any]:
    return {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"}


def _variable(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": name.capitalize(),
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": VARIABLES[name], "refId": name},
        "definition": VARIABLES[name],
        "includeAll": True,
        "allValue": ".*",
        "multi": True,
        "current": {"text": "All", "value": "$__all"},
        "refresh": 2,
        "sort": 1,
    }


def _panel(number: int, panel: Panel) -> dict[str, Any]:
    per_row = COLUMNS // WIDTH
    targets = [
        {"refId": chr(ord("A") + place), "expr": query, "legendFormat": legend, "datasource": DATASOURCE}
        | ({"instant": True, "format": "table"} if panel.kind == "table" else {})
        for place, (query, legend) in enumerate(panel.queries)
    ]
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    steps += [{"color": "yellow", "value": panel.warn}] if panel.warn is not None else []
    steps += [{"color": "red", "value": panel.bad}] if panel.bad is not None else []
    custom = {"lineWidth": 1, "fillOpacity": 8, "thresholdsStyle": {"mode": "line" if len(steps) > 1 else "off"}}
    return {
        "id": number + 1,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": DATASOURCE,
        "gridPos": {"h": HEIGHT, "w": WIDTH, "x": number % per_row * WIDTH, "y": number // per_row * HEIGHT},
        "targets": targets,
        "fieldConfig": {
            "defaults": {
                "unit": panel.unit,
                "min": 0,
                "thresholds": {"mode": "absolute", "steps": steps},
                **({"custom": custom} if panel.kind == "timeseries" else {}),
            },
            "overrides": [],
        },
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom"},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
        if panel.kind == "timeseries"
        else {},
    }


def prometheus_rule() -> str:
    """The rules for a cluster, as the Prometheus operator reads them."""
    files = [yaml.safe_load((HERE / "prometheus" / name).read_text(encoding="utf-8")) for name in CLUSTER_RULES]
    document = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "autoglm", "namespace": "autoglm"},
        "spec": {
            "groups": [
                _named(name, group) for name, file in zip(CLUSTER_RULES, files, strict=True) for group in file["groups"]
            ]
        },
    }
    head = "# Written by deploy/observability/generate.py from prometheus/*.yaml; edit those.\n"
    return head + yaml.dump(document, Dumper=_Readable, sort_keys=False, width=1000, allow_unicode=True)


class _Readable(yaml.SafeDumper):
    """Texts of several lines as blocks."""


_Readable.add_representer(
    str,
    lambda dumper, value: dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None),
)


def _named(file: str, group: dict[str, Any]) -> dict[str, Any]:
    """Group names must differ within one object."""
    return {**group, "name": f"{group['name']}.{file.removesuffix('.yaml')}"}


if __name__ == "__main__":
    for board in ALL:
        (HERE / "dashboards" / f"{board.uid.removeprefix('autoglm-')}.json").write_text(text(board), encoding="utf-8")
    (HERE / "kubernetes" / "rules.yaml").write_text(prometheus_rule(), encoding="utf-8")
