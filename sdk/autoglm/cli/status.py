"""What a client can see of the mesh: is the ingress there, does the gateway serve, which models, how far away.

With the address of an Envoy admin port it also tells that proxy's state and the hosts it can reach.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.request
from dataclasses import dataclass
from typing import Any

from autoglm import AutoglmError, Client, Model

MAX_ADMIN_BYTES = 16 * 2**20
CHECK_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Report:
    """The findings. `error` is what kept the gateway from answering, `models` what it serves."""

    target: str
    health: str
    latency_s: float | None
    models: tuple[Model, ...]
    error: AutoglmError | None
    proxy: tuple[tuple[str, str], ...]

    @property
    def is_good(self) -> bool:
        """True when a request would find a model."""
        return self.error is None and bool(self.models) and self.health != "not_serving"


def inspect(client: Client, admin: str | None) -> Report:
    """Asks once; never raises for a mesh that is down."""
    health, latency_s, error = "unreachable", None, None
    models: tuple[Model, ...] = ()
    try:
        started = time.monotonic()
        models = client.models(timeout=CHECK_TIMEOUT_S)
        latency_s = time.monotonic() - started
        health = _health(client)
    except AutoglmError as failure:
        error = failure
    return Report(client.target, health, latency_s, models, error, _proxy(admin) if admin else ())


def _health(client: Client) -> str:
    try:
        return client.health(timeout=CHECK_TIMEOUT_S).status
    except AutoglmError:  # an ingress may keep the health method to itself; the models have answered
        return "unknown"


def _proxy(admin: str) -> tuple[tuple[str, str], ...]:
    base = (admin if "://" in admin else f"http://{admin}").rstrip("/")
    try:
        info, clusters = _get(f"{base}/server_info"), _get(f"{base}/clusters?format=json")
        facts = [("proxy", f"{info['state']} {str(info['version']).split('/')[1]}")]
        for cluster in clusters.get("cluster_statuses", []):
            hosts = cluster.get("host_statuses", [])
            healthy = sum(host.get("health_status", {}).get("eds_health_status") == "HEALTHY" for host in hosts)
            facts.append((f"cluster {cluster['name']}", f"{healthy}/{len(hosts)} hosts healthy"))
        return tuple(facts)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, http.client.HTTPException) as error:
        return (("proxy", f"no answer from {base}: {error}"),)


def _get(url: str) -> Any:
    if not url.startswith(("http://", "https://")):
        raise ValueError("the admin address must be host:port or an http URL")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=CHECK_TIMEOUT_S) as response:
        return json.loads(response.read(MAX_ADMIN_BYTES))
