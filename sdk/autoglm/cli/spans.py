"""One span as the trace sink keeps it, and the tree that the spans of a trace make. Pure data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Span:
    """One timed piece of work. Times are nanoseconds since 1970; ids are lower-case hex; no parent is an empty text."""

    trace_id: str
    span_id: str
    parent_id: str
    service: str
    name: str
    start_ns: int
    end_ns: int
    instance: str = ""
    kind: str = ""
    is_error: bool = False
    attributes: Mapping[str, str] = field(default_factory=dict)
    events: tuple[str, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Roughly what it takes in memory."""
        texts = [self.service, self.name, self.instance, *self.events, *self.attributes, *self.attributes.values()]
        return 400 + sum(len(text) + 56 for text in texts)

    def to_json(self) -> dict[str, Any]:
        """A JSON object with this class's field names."""
        return {
            "trace_id": self.trace_id,
            "span_id": self.span_id,
            "parent_id": self.parent_id,
            "service": self.service,
            "name": self.name,
            "start_ns": self.start_ns,
            "end_ns": self.end_ns,
            "instance": self.instance,
            "kind": self.kind,
            "is_error": self.is_error,
            "attributes": dict(self.attributes),
            "events": list(self.events),
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Span:
        """The inverse of `to_json`."""
        return Span(**{**value, "events": tuple(value.get("events", ()))})


@dataclass(frozen=True, slots=True)
class Node:
    """A span with its children, earliest first. `is_orphan`: its parent was never seen."""

    span: Span
    children: tuple[Node, ...] = ()
    is_orphan: bool = False


@dataclass(frozen=True, slots=True)
class Tree:
    """A trace: proper roots first, then orphans, each group by start time."""

    roots: tuple[Node, ...]

    @property
    def start_ns(self) -> int:
        """When the earliest span began; clocks of different machines may disagree, so it need not be the root."""
        return min((node.span.start_ns for _, node, _ in self.walk()), default=0)

    @property
    def end_ns(self) -> int:
        """When the last span ended."""
        return max((node.span.end_ns for _, node, _ in self.walk()), default=0)

    @property
    def services(self) -> frozenset[str]:
        """Who took part."""
        return frozenset(node.span.service for _, node, _ in self.walk())

    @property
    def has_root(self) -> bool:
        """Whether the beginning of the trace has arrived."""
        return any(not node.is_orphan for node in self.roots)

    @property
    def orphans(self) -> int:
        """Spans whose parents are missing."""
        return sum(node.is_orphan for node in self.roots)

    def walk(self) -> Iterable[tuple[tuple[bool, ...], Node, bool]]:
        """Every node, parents first, with "is the last child" for each of its ancestors and for itself."""
        stack = [((), root, index == len(self.roots) - 1) for index, root in reversed(list(enumerate(self.roots)))]
        path: tuple[bool, ...]
        while stack:
            path, node, is_last = stack.pop()
            yield path, node, is_last
            below = (*path, is_last)
            last = len(node.children) - 1
            stack += [(below, child, index == last) for index, child in reversed(list(enumerate(node.children)))]  # type: ignore[misc]  # the paths grow


def build(spans: Iterable[Span]) -> Tree:
    """The tree of one trace. Every span appears once, whatever the parents say: duplicates are dropped, circles cut."""
    unique = {span.span_id: span for span in spans}
    ordered = sorted(unique.values(), key=lambda span: (span.start_ns, -span.end_ns, span.span_id))
    children: dict[str, list[Span]] = {}
    tops: list[Span] = []
    for span in ordered:
        if span.parent_id and span.parent_id != span.span_id and span.parent_id in unique:
            children.setdefault(span.parent_id, []).append(span)
        else:
            tops.append(span)
    placed: set[str] = set()
    nodes = [_node(span, children, placed, is_orphan=span.parent_id != "") for span in tops]
    for span in ordered:  # what is left hangs in circles: the earliest of each circle stands for it
        if span.span_id not in placed:
            nodes.append(_node(span, children, placed, is_orphan=True))
    return Tree(tuple(sorted(nodes, key=lambda node: (node.is_orphan, node.span.start_ns))))


def _node(top: Span, children: Mapping[str, list[Span]], placed: set[str], *, is_orphan: bool) -> Node:
    """Built without recursion: a trace from strangers may be a chain of thousands."""
    order: list[Span] = []
    stack = [top]
    while stack:
        span = stack.pop()
        if span.span_id in placed:
            continue
        placed.add(span.span_id)
        order.append(span)
        stack += children.get(span.span_id, [])
    made: dict[str, Node] = {}
    for span in reversed(order):
        mine = children.get(span.span_id, [])
        below = tuple(made.pop(child.span_id) for child in mine if child.span_id in made)
        made[span.span_id] = Node(span, below, is_orphan and span is top)
    return made[top.span_id]
