"""A Prometheus page on a port of its own, always in the classic text format.

prometheus_client would answer a Prometheus server in OpenMetrics, where it writes `vllm:` names with an underscore
(0.26 does): a dashboard or a picker that asks for `vllm:num_requests_running` would find nothing.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import REGISTRY, CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

IDLE_S = 30


def serve(address: str, port: int, registry: CollectorRegistry = REGISTRY) -> int:
    """Serves from a thread until the process ends; returns the port. Raises OSError when the port is taken."""
    page = make_wsgi_app(registry)

    def answer(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        environ.pop("HTTP_ACCEPT", None)
        answered: Iterable[bytes] = page(environ, start)
        return answered

    server = make_server(address, port, answer, _Server6 if ":" in address else ThreadingWSGIServer, _Handler)
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return server.server_port


class _Server6(ThreadingWSGIServer):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = IDLE_S

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: a scrape every few seconds is no event."""
