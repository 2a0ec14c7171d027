"""Keeps the newest traces within two bounds, spans and bytes. Thread-safe: gRPC writes, the query page reads."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from autoglm.cli.spans import Span, build

REQUEST_KEYS = ("gen_ai.response.id", "guid:x-request-id")
"""Where a request's own id is found: the gateway's, which clients are told, and Envoy's."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the store may hold."""

    spans: int = 50_000
    bytes: int = 64 << 20
    trace_spans: int = 5_000


class TraceStore:
    """Traces by id, the one that heard of something last at the end."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._lock = threading.Lock()
        self._traces: OrderedDict[str, dict[str, Span]] = OrderedDict()
        self.spans = 0
        self.bytes = 0

    def add(self, spans: Iterable[Span]) -> int:
        """Keeps them and forgets the oldest traces as needed. Returns how many spans were dropped or forgotten."""
        lost = 0
        with self._lock:
            for span in spans:
                trace = self._traces.setdefault(span.trace_id, {})
                self._traces.move_to_end(span.trace_id)
                if span.span_id in trace:  # exporters repeat a batch whose answer they did not see
                    continue
                if len(trace) >= self._bounds.trace_spans:
                    lost += 1
                    continue
                trace[span.span_id] = span
                self.spans += 1
                self.bytes += span.size_bytes
                lost += self._shrink()
        return lost

    def trace(self, trace_id: str) -> tuple[Span, ...]:
        """The spans of a trace, or none."""
        with self._lock:
            return tuple(self._traces.get(trace_id, {}).values())

    def newest(self, limit: int) -> list[dict[str, Any]]:
        """Summaries of the traces that heard of something last, newest first."""
        with self._lock:
            chosen = [(name, tuple(self._traces[name].values())) for name in list(reversed(self._traces))[:limit]]
        return [_summary(name, spans) for name, spans in chosen if spans]

    def of_request(self, request_id: str) -> list[dict[str, Any]]:
        """Summaries of the traces in which a span carries this request id, the newest first."""
        with self._lock:
            chosen = [
                (name, tuple(spans.values()))
                for name, spans in reversed(self._traces.items())
                if any(span.attributes.get(key) == request_id for span in spans.values() for key in REQUEST_KEYS)
            ]
        return [_summary(name, spans) for name, spans in chosen]

    def _shrink(self) -> int:
        lost = 0
        while self._traces and (self.spans > self._bounds.spans or self.bytes > self._bounds.bytes):
            _, oldest = self._traces.popitem(last=False)
            self.spans -= len(oldest)
            self.bytes -= sum(span.size_bytes for span in oldest.values())
            lost += len(oldest)
        return lost


def _summary(trace_id: str, spans: tuple[Span, ...]) -> dict[str, Any]:
    tree = build(spans)
    top = tree.roots[0].span
    return {
        "trace_id": trace_id,
        "name": top.name,
        "service": top.service,
        "start_ns": tree.start_ns,
        "duration_ns": tree.end_ns - tree.start_ns,
        "spans": len(spans),
        "services": sorted(tree.services),
        "has_error": any(span.is_error for span in spans),
        "has_root": tree.has_root,
    }
