"""Draws the tree of one trace in a terminal: who worked, from when to when, with what facts. Plain text for pipes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from autoglm.cli.spans import Node, Span, Tree

BAR = 24
WIDE = 120
TIME_WIDTH = 9
MIN_NAME, MIN_FACTS = 30, 24
COLOURS = ("cyan", "green", "magenta", "yellow", "blue", "bright_red", "bright_cyan", "bright_green")
SHOWN: tuple[tuple[str, str], ...] = (
    ("gen_ai.request.model", "model"),
    ("gen_ai.usage.input_tokens", "in"),
    ("gen_ai.usage.output_tokens", "out"),
    ("gen_ai.response.finish_reasons", "finish"),
    ("autoglm.schedule.endpoint", "picked"),
    ("autoglm.schedule.candidates", "of"),
    ("autoglm.schedule.matched_blocks", "matched"),
    ("autoglm.blocks.wanted", "blocks"),
    ("autoglm.blocks.fetched", "fetched"),
    ("autoglm.cache.asked", "asked"),
    ("autoglm.cache.matched", "matched"),
    ("autoglm.tokens", "tokens"),
    ("rpc.grpc.status_code", "grpc"),
    ("grpc.status_code", "grpc"),
    ("http.status_code", "http"),
    ("response_flags", "flags"),
    ("peer.address", "peer"),
)
"""Attributes worth a place on the line, in this order."""
DULL = {("http", "200"), ("grpc", "0"), ("flags", "-"), ("peer", "127.0.0.1")}
_TITLES = (
    (re.compile(r"^async (?:[a-z_0-9]+\.)*([A-Za-z.]+?)(?:\.Process)? egress$"), r"asks \1"),
    (re.compile(r"^router (?:[-a-z0-9]+~)?outbound\|\d+\|([^|]*)\|([a-z0-9-]+)\.[^;]*;? egress$"), r"router → \2 \1"),
    (re.compile(r"\.[a-z0-9-]+\.svc\.cluster\.local"), ""),
    (re.compile(r"^/(?:[a-z_0-9]+\.)+"), ""),
)
FACTS = 6
FACT_CHARS = 48


def render(tree: Tree, width: int) -> RenderableType:
    """For a terminal: aligned columns cut to its width, a bar per span, one colour per service."""
    table = Table.grid(padding=(0, 1))
    for is_number in (False, True, True, False, False):
        table.add_column(justify="right" if is_number else "left", no_wrap=True)
    colours = _colours(tree)
    rows = [(_name(path, node, is_last, colours), node) for path, node, is_last in tree.walk()]
    bar_width = BAR if width >= WIDE else BAR // 2
    left = width - 2 * TIME_WIDTH - bar_width - len(table.columns)
    name_width = min(max(name.cell_len for name, _ in rows), max(MIN_NAME, left - MIN_FACTS)) if rows else MIN_NAME
    table.add_row(*(Text(heading, style="bold") for heading in ("span", "at", "took", "", "facts")))
    for name, node in rows:
        at, took = _times(node.span, tree)
        name.truncate(name_width, overflow="ellipsis", pad=True)
        about = Text(_line(node), style="dim")
        about.truncate(max(1, left - name_width), overflow="ellipsis")
        table.add_row(name, at, took, Text(bar(node.span, tree, bar_width), style=_colour(node, colours)), about)
    return Group(table, Text(summary(tree), style="dim"))


def plain(tree: Tree) -> list[str]:
    """The same as lines without colours or bars."""
    lines = []
    for path, node, is_last in tree.walk():
        at, took = _times(node.span, tree)
        orphan = "  (parent not seen)" if node.is_orphan else ""
        error = "  ERROR" if node.span.is_error else ""
        name = f"{_guide(path, is_last)}{_who(node.span)} {title(node.span.name)}"
        lines.append(f"{name}  at {at}, took {took}{error}{orphan}  {_line(node)}".rstrip())
    return [*lines, summary(tree)]


def show(tree: Tree, console: Console) -> None:
    """Draws, or prints plainly when the output is not a terminal."""
    if console.is_terminal:
        console.print(render(tree, console.width))
    else:
        for line in plain(tree):
            console.print(line, soft_wrap=True, markup=False, highlight=False)


def bar(span: Span, tree: Tree, width: int = BAR) -> str:
    """Where the span lies within the trace, in `width` characters; never empty."""
    whole = max(1, tree.end_ns - tree.start_ns)
    start = min(width - 1, (span.start_ns - tree.start_ns) * width // whole)
    length = max(1, min(width - start, round((span.end_ns - span.start_ns) * width / whole)))
    return "·" * start + "━" * length + "·" * (width - start - length)


def summary(tree: Tree) -> str:
    """One line: how many spans of which services, in what time."""
    spans = [node.span for _, node, _ in tree.walk()]
    trace = spans[0].trace_id if spans else "-"
    took = duration(tree.end_ns - tree.start_ns)
    text = f"trace {trace}: {len(spans)} spans of {', '.join(sorted(tree.services))}; {took}"
    return text + (f"; {tree.orphans} without their parent" if tree.orphans else "")


def title(name: str) -> str:
    """A span's name without what every reader knows: package of a method, namespace and domain of a host."""
    for pattern, replacement in _TITLES:
        name = pattern.sub(replacement, name)
    return name.strip()


def duration(nanoseconds: int) -> str:
    """A time span in the unit a reader would choose."""
    if abs(nanoseconds) >= 1_000_000_000:
        return f"{nanoseconds / 1e9:.2f} s"
    return f"{nanoseconds / 1e6:.1f} ms" if abs(nanoseconds) >= 100_000 else f"{nanoseconds / 1e3:.0f} µs"


def facts(attributes: Mapping[str, str]) -> list[str]:
    """The attributes that matter to a reader, shortened."""
    found: dict[str, str] = {}
    for key, label in SHOWN:
        if (value := attributes.get(key)) and (label, value) not in DULL:
            found.setdefault(label, _short(value, FACT_CHARS))
    return [f"{label}={value}" for label, value in found.items()][:FACTS]


def _name(path: tuple[bool, ...], node: Node, is_last: bool, colours: Mapping[str, str]) -> Text:
    name = Text(_guide(path, is_last), style="dim")
    name.append(_who(node.span), style=f"bold {_colour(node, colours)}").append(f" {title(node.span.name)}")
    if node.is_orphan:
        name.append("  (parent not seen)", style="yellow")
    return name


def _colour(node: Node, colours: Mapping[str, str]) -> str:
    return "red" if node.span.is_error else colours[node.span.service]


def _who(span: Span) -> str:
    """The replica, where its name tells the service; else the service."""
    return span.instance if span.instance.startswith(span.service) else span.service


def _line(node: Node) -> str:
    return "  ".join([*facts(node.span.attributes), *(f"[{event}]" for event in _distinct(node.span.events)[:3])])


def _distinct(events: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(event for event in events if event.startswith(("fallback.", "exception", "resume"))))


def _times(span: Span, tree: Tree) -> tuple[str, str]:
    return f"+{duration(span.start_ns - tree.start_ns)}", duration(span.end_ns - span.start_ns)


def _guide(path: tuple[bool, ...], is_last: bool) -> str:
    if not path:
        return ""
    return "".join("   " if last else "│  " for last in path[1:]) + ("└─ " if is_last else "├─ ")


def _colours(tree: Tree) -> dict[str, str]:
    order = dict.fromkeys(node.span.service for _, node, _ in tree.walk())
    return {service: COLOURS[index % len(COLOURS)] for index, service in enumerate(order)}


def _short(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
