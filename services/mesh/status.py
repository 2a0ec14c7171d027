"""What runs, how it is, and what it did other than asked: gathered from the state file, Envoy and the metrics pages."""

from __future__ import annotations

import asyncio
import time
import urllib.request
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from services.mesh.envoy import Admin, LoadedCertificate
from services.mesh.state import IdentityState, MeshState

FALLBACK = "autoglm_fallback"
ENVOY_FALLBACKS = "(failure_mode_allowed|update_rejected|upstream_rq_pending_overflow|ejections_active)"
METRICS_TIMEOUT_S = 2.0
MAX_PAGE_BYTES = 4 << 20
PHASE_STYLE = {"ready": "green", "starting": "yellow", "waiting": "dim", "backing off": "red", "failed": "bold red"}


def gather(state: MeshState) -> dict[str, Any]:
    """Everything as one JSON object. What cannot be asked is left out, and said under `unanswered`."""
    return asyncio.run(_gather(state))


def show(status: dict[str, Any], console: Console) -> None:
    """Tables for people."""
    policy = status["policy"]
    console.print(
        f"mesh [bold]{status['phase']}[/], supervisor pid {status['pid']}, up in {status['up_s']:.1f} s, "
        f"policy [bold]{policy['version'] or '-'}[/] ({_ago(policy['accepted_unix_s'])} ago)"
    )
    table = _table("process", "state", "pid", "restarts", "since", "ports", "labels", "last exit")
    for item in status["processes"]:
        ports = " ".join(
            f"{name}:{number}" for name, number in (item["ports"] | {"metrics": item["metrics_port"]}).items() if number
        )
        ports = " ".join([ports, *(f"sidecar {name}:{number}" for name, number in item["inbound"].items())])
        labels = " ".join(f"{key}={value}" for key, value in item["labels"].items() if key != "app")
        style = PHASE_STYLE.get(item["phase"], "")
        phase = f"[{style}]{item['phase']}[/]" if style else item["phase"]
        table.add_row(
            item["name"],
            phase,
            str(item["pid"] or "-"),
            str(item["restarts"]),
            _ago(item["since_unix_s"]),
            ports,
            labels,
            item["last_exit"],
        )
    console.print(table)
    for item in status["processes"]:
        if item["phase"] in ("backing off", "failed") and item["last_line"]:
            console.print(f"{item['name']}: {item['last_line']}", style="red", markup=False, highlight=False)
    if status["clusters"]:
        table = _table("Envoy cluster", "healthy", "endpoints", "not healthy")
        for name, hosts in sorted(status["clusters"].items(), key=lambda item: _cluster(item[0])):
            bad = [f"{host['address']} ({host['health']})" for host in hosts if host["health"] != "healthy"]
            table.add_row(_cluster(name), str(len(hosts) - len(bad)), str(len(hosts)), ", ".join(bad))
        console.print(table)
    if status["identities"]:
        table = _table("identity", "serial", "expires in", "renewed in", "in Envoy")
        for item in status["identities"]:
            now = time.time()
            table.add_row(
                item["spiffe_id"],
                item["serial"][:16],
                _span(item["expires_unix_s"] - now),
                _span(item["renew_unix_s"] - now),
                {True: "yes", False: "[yellow]an older one[/]", None: "-"}[item["is_loaded"]],
            )
        console.print(table)
    if policy["weights"]:
        table = _table("host", "route", "goes to", "weight")
        for weight in policy["weights"]:
            table.add_row(weight["host"], weight["route"], weight["destination"], f"{weight['weight']} %")
        console.print(table)
    if status["fallbacks"]:
        table = _table("fallback", "of", "times")
        for item in status["fallbacks"]:
            table.add_row(item["kind"], item["of"], str(item["count"]))
        console.print(table)
    else:
        console.print("no fallbacks: everything was done as asked", style="dim")
    for line in policy["warnings"]:
        console.print(f"policy warning: {line}", style="yellow", markup=False, soft_wrap=True)
    if policy["refused"]:
        console.print(
            f"[bold red]the edit of {_ago(policy['refused_unix_s'])} ago is refused; the old policy stays:[/]"
        )
        for line in policy["refused"]:
            console.print(f"  {line}", style="red", markup=False)
    for line in status["unanswered"]:
        console.print(f"no answer: {line}", style="yellow")


async def _gather(state: MeshState) -> dict[str, Any]:
    unanswered: list[str] = []
    loaded: list[LoadedCertificate] = []
    fallbacks: list[dict[str, Any]] = []
    clusters: dict[str, list[dict[str, str]]] = {}
    host, _, port = state.addresses.admin.rpartition(":")
    admin = Admin(host, int(port))
    try:
        for cluster in await admin.clusters():
            clusters[cluster["name"]] = [_host(item) for item in cluster.get("host_statuses", [])]
        loaded = await admin.certificates()
        for name, count in (await admin.counters(ENVOY_FALLBACKS)).items():
            if count:
                fallbacks.append({"kind": name, "of": "envoy", "count": count})
    except OSError as error:
        unanswered.append(f"Envoy ({error})")
    # Services are on the loopback, behind their sidecars; the sink is where the mesh is told to listen.
    away = state.addresses.otlp.rpartition(":")[0]
    pages = [
        (item.name, host if item.inbound else away, item.metrics_port)
        for item in state.processes
        if item.metrics_port and item.phase == "ready"
    ]
    answers = await asyncio.gather(
        *(asyncio.to_thread(_page, where, number) for _, where, number in pages), return_exceptions=True
    )
    for (name, _, _), answer in zip(pages, answers, strict=True):
        if isinstance(answer, BaseException):
            unanswered.append(f"metrics of {name} ({answer})")
        else:
            fallbacks += [{"kind": kind, "of": name, "count": count} for kind, count in _fallbacks(answer)]
    identities = [item.model_dump() | {"is_loaded": _is_loaded(item, loaded)} for item in state.identities]
    found = {"clusters": clusters, "fallbacks": fallbacks, "unanswered": unanswered, "identities": identities}
    return state.model_dump() | found


def _is_loaded(item: IdentityState, loaded: list[LoadedCertificate]) -> bool | None:
    """Whether Envoy shows this very certificate; None when it shows none of that name (nobody needs it)."""
    serials = {one.serial for one in loaded if one.spiffe_id == item.spiffe_id}
    return serials == {item.serial} if serials else None


def _page(host: str, port: int) -> str:
    with urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=METRICS_TIMEOUT_S) as answer:
        body: bytes = answer.read(MAX_PAGE_BYTES)
    return body.decode("utf-8", "replace")


def _fallbacks(page: str) -> list[tuple[str, int]]:
    lines = "\n".join(line for line in page.splitlines() if FALLBACK in line and "_created" not in line)
    return [
        (sample.labels.get("kind", "?"), int(sample.value))
        for family in text_string_to_metric_families(lines + "\n")
        for sample in family.samples
        if sample.value
    ]


def _host(item: dict[str, Any]) -> dict[str, str]:
    address = item.get("address", {}).get("socket_address", {})
    health = item.get("health_status", {})
    flaws = sorted(key for key, value in health.items() if value is True)
    if health.get("eds_health_status") not in (None, "HEALTHY", "UNKNOWN"):
        flaws.append(str(health["eds_health_status"]).lower())
    return {
        "address": f"{address.get('address', '?')}:{address.get('port_value', '?')}",
        "health": ", ".join(flaws).replace("failed_outlier_check", "ejected") or "healthy",
    }


def _cluster(name: str) -> str:
    """`gateway~outbound|50051|v1|worker.autoglm.svc.cluster.local` as `gateway → worker:50051 v1`."""
    owner, _, rest = name.rpartition("~")
    match rest.split("|"):
        case ["outbound", port, subset, host]:
            there = f"{host.removesuffix('.svc.cluster.local').partition('.')[0]}:{port} {subset}".strip()
            return f"{owner} → {there}" if owner else there
        case ["inbound", port, _, _]:
            return f"→ {owner}:{port}"
        case _:
            return name


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column)
    return table


def _ago(unix_s: float) -> str:
    return _span(time.time() - unix_s)


def _span(seconds: float) -> str:
    seconds = max(0.0, seconds)
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
