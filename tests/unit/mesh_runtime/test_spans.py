"""The tree of a trace and its drawing, from spans that may come late, twice, or with nonsense for parents."""

from __future__ import annotations

import io

from autoglm.cli import timeline
from autoglm.cli.spans import Span, build
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

MS = 1_000_000


def span(
    name: str, parent: str = "", start: int = 0, end: int = 10, service: str = "gateway", **attributes: str
) -> Span:
    return Span("t" * 32, name, parent, service, f"work {name}", start * MS, end * MS, attributes=attributes)


def shape(spans: list[Span]) -> list[tuple[int, str]]:
    return [(len(path), node.span.span_id) for path, node, _ in build(spans).walk()]


def test_children_follow_their_parent_in_order_of_time() -> None:
    """Whatever order the spans arrive in, the tree reads top down and by the clock."""
    spans = [span("c", "a", 5), span("b", "a", 1), span("d", "b", 2), span("a", "", 0)]
    assert shape(spans) == [(0, "a"), (1, "b"), (2, "d"), (1, "c")]


def test_a_span_without_its_parent_is_shown_and_said_so() -> None:
    """A missing parent hides nothing."""
    tree = build([span("a"), span("x", "lost", 3)])
    assert [node.is_orphan for node in tree.roots] == [False, True]
    assert tree.orphans == 1 and tree.has_root
    assert any("(parent not seen)" in line for line in timeline.plain(tree))


def test_spans_that_are_each_others_parents_are_still_shown() -> None:
    """A circle is cut at its earliest span."""
    spans = [span("a", "b", 1), span("b", "a", 2), span("s", "s", 3)]
    assert sorted(name for _, name in shape(spans)) == ["a", "b", "s"]


def test_a_very_long_chain_is_no_trouble() -> None:
    """Depth is bounded by nothing but the store, so nothing may recurse."""
    spans = [span(str(n), str(n - 1) if n else "", n, n + 1) for n in range(3000)]
    assert shape(spans)[-1] == (2999, "2999")


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(-1, 9), st.integers(0, 50)), max_size=12))
def test_every_span_appears_exactly_once(raw: list[tuple[int, int, int]]) -> None:
    """For any parents at all, the tree holds each span id once."""
    spans = [span(str(a), "" if b < 0 else str(b), start, start + 1) for a, b, start in raw]
    shown = [name for _, name in shape(spans)]
    assert sorted(shown) == sorted({item.span_id for item in spans})


def test_the_drawing_names_every_service_with_times_and_facts() -> None:
    """A terminal gets bars, a pipe gets plain lines; both name service, offset, duration and the facts."""
    tree = build(
        [
            span("a", service="envoy-ingress", start=0, end=100),
            span("b", "a", 25, 75, "sparse-inference", **{"gen_ai.usage.output_tokens": "12", "boring": "x"}),
        ]
    )
    output = io.StringIO()
    timeline.show(tree, Console(file=output, force_terminal=True, width=200))
    drawn = output.getvalue()
    assert "━" in drawn and "sparse-inference" in drawn and "+25.0 ms" in drawn
    piped = io.StringIO()
    timeline.show(tree, Console(file=piped, width=40))
    text = piped.getvalue()
    assert "└─ sparse-inference work b  at +25.0 ms, took 50.0 ms  out=12" in text
    assert "━" not in text and "boring" not in text and "\x1b" not in text


def test_names_lose_what_every_reader_knows() -> None:
    """The package of a method and the domain of a host are left out; anything else stays as it is."""
    assert timeline.title("/autoglm.gateway.v1.GatewayService/Generate") == "GatewayService/Generate"
    assert timeline.title("egress cache.autoglm.svc.cluster.local") == "egress cache"
    assert timeline.title("router outbound|50051|v1|worker.autoglm.svc.cluster.local; egress") == "router → worker v1"
    picking = "async envoy.service.ext_proc.v3.ExternalProcessor.Process egress"
    assert timeline.title(picking) == "asks ExternalProcessor"
    assert timeline.title("fetch prefix") == "fetch prefix"


def test_bars_lie_where_the_time_was() -> None:
    """The bar of the second half starts in the middle, and the shortest span is still visible."""
    tree = build([span("a", start=0, end=100), span("b", "a", 50, 100), span("c", "a", 100, 100)])
    _, second, last = (timeline.bar(node.span, tree) for _, node, _ in tree.walk())
    assert second == "·" * 12 + "━" * 12
    assert last.endswith("━") and len(last) == timeline.BAR


def test_json_round_trip() -> None:
    """What the sink's page says is what the command line reads."""
    one = span("a", "b", 1, 2, boring="x")
    assert Span.from_json(one.to_json()) == one
