"""A page for the command line, as JSON, on the loopback: `/traces/<id>`, `/traces?limit=`, `/traces?request_id=`."""

from __future__ import annotations

import json
import socketserver
import threading
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import parse_qs
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from services.mesh.sink.logs import LogStore
from services.mesh.sink.store import TraceStore

MAX_LIMIT = 1000
IDLE_S = 10


class QueryPage:
    """Serves from its own thread until closed."""

    def __init__(self, store: TraceStore, records: LogStore, address: str, port: int) -> None:
        self._server = make_server(address, port, _application(store, records), _Server, _Handler)
        self.port: int = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, name="traces", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops serving."""
        self._server.shutdown()
        self._server.server_close()


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Handler(WSGIRequestHandler):
    timeout = IDLE_S

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: the command line asks often."""


def _application(
    store: TraceStore, records: LogStore
) -> Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]:
    def answer(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        status, value = _route(store, records, environ)
        body = json.dumps(value).encode()
        start(status, [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
        return [body]

    return answer


def _route(store: TraceStore, records: LogStore, environ: dict[str, Any]) -> tuple[str, Any]:
    if environ["REQUEST_METHOD"] != "GET":
        return "405 Method Not Allowed", {"error": "only GET"}
    match environ.get("PATH_INFO", "").strip("/").split("/"):
        case ["traces"]:
            query = parse_qs(environ.get("QUERY_STRING", ""))
            if request_id := query.get("request_id", [""])[0]:
                return "200 OK", {"traces": store.of_request(request_id)}
            asked = query.get("limit", ["20"])[0]
            if not (asked.isascii() and asked.isdigit() and 1 <= int(asked) <= MAX_LIMIT):
                return "400 Bad Request", {"error": f"limit is a number from 1 to {MAX_LIMIT}, not {asked[:20]!r}"}
            return "200 OK", {"traces": store.newest(int(asked))}
        case ["traces", trace_id]:
            if spans := store.trace(trace_id.lower()):
                logs = records.of(trace_id.lower())
                return "200 OK", {
                    "trace_id": trace_id.lower(),
                    "spans": [span.to_json() for span in spans],
                    "logs": logs,
                }
            return "404 Not Found", {"error": "no such trace; the oldest are forgotten first"}
        case _:
            return "404 Not Found", {"error": "ask /traces?limit=20, /traces?request_id=<id> or /traces/<trace id>"}
