"""`autoglm trace ID`: finds one request's trace at the sink of a mesh, by trace id or request id, and shows it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rich.console import Console

from autoglm.cli import meshes, timeline
from autoglm.cli.output import Output
from autoglm.cli.spans import Span, build
from autoglm.errors import NotFoundError, UnavailableError

LAST = "last"
LOG_FACTS = ("status", "grpc_status", "flags", "details", "duration_ms", "attempts", "cluster", "upstream")
_TRACE_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Found:
    """A trace: its spans, and what proxies logged within it."""

    trace_id: str
    spans: tuple[Span, ...]
    logs: tuple[Mapping[str, Any], ...]


def show(which: str, directories: Sequence[Path], address: str | None, output: Output) -> None:
    """Writes the tree, or one JSON object. Raises `NotFoundError` and `UnavailableError`."""
    found = look_up(which, sinks(directories, address))
    if output.as_json:
        spans = [span.to_json() for span in found.spans]
        output.record({"trace_id": found.trace_id, "spans": spans, "logs": list(found.logs)})
        return
    tree = build(found.spans)
    if output.is_person:
        timeline.show(tree, Console(highlight=False, markup=False))
    else:
        output.write("".join(f"{line}\n" for line in timeline.plain(tree)))
    for log in found.logs:
        about = log.get("attributes", {})
        facts = "  ".join(f"{name}={about[name]}" for name in LOG_FACTS if about.get(name) not in (None, "", "-"))
        output.write(f"log of {log.get('service')}: {log.get('body')}  {facts}\n")


def sinks(directories: Sequence[Path], address: str | None) -> list[str]:
    """Where to ask: the address that was given, or every mesh's own sink."""
    return [address] if address else [running.addresses["traces"] for running in meshes.find(directories)]


def look_up(which: str, addresses: Sequence[str]) -> Found:
    """The trace of that id at the first sink that has it; clouds forward a request, so the largest of several."""
    candidates: list[Found] = []
    silent: list[UnavailableError] = []
    for address in addresses:
        try:
            candidates += [_fetch(address, trace_id) for trace_id in _ids(address, which)]
        except LookupError:
            continue
        except UnavailableError as error:
            silent.append(error)
    if candidates:
        return max(candidates, key=lambda found: len(found.spans))
    if silent:
        raise silent[0]
    raise NotFoundError(
        f"no trace of {which!r}: a trace id has 32 hexadecimal digits, a request id is what the answer carries; "
        "sinks keep the newest traces only, and spans take a moment to arrive"
    )


def _ids(address: str, which: str) -> list[str]:
    """The trace ids that `which` may mean at this sink, most likely first."""
    if _TRACE_ID.fullmatch(which.lower()):
        return [which.lower()]
    query = "limit=1" if which == LAST else f"request_id={quote(which, safe='')}"
    listed = json.loads(meshes.get(address, f"/traces?{query}")).get("traces", [])
    return [str(item["trace_id"]) for item in listed][:1]


def _fetch(address: str, trace_id: str) -> Found:
    answer = json.loads(meshes.get(address, f"/traces/{trace_id}"))
    return Found(trace_id, tuple(map(Span.from_json, answer["spans"])), tuple(answer.get("logs", ())))
