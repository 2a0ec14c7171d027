"""`diff` and `explain` for people: what they print on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console

from services.mesh.differences import Change
from services.mesh.explain import Explanation, Request
from services.mesh.explain.story import Fact

_SIGN = {"added": ("+", "green"), "removed": ("-", "red"), "changed": ("~", "yellow")}
_VERDICT = {"allowed": "green", "denied": "red", "depends": "yellow", "unchecked": "dim"}


def show_changes(changes: Sequence[Change], streams: Mapping[str, int], console: Console) -> None:
    """Resource by resource, and at the end what it costs those who are being served."""
    for change in changes:
        sign, style = _SIGN[change.how]
        _line(console, f"{sign} {change.kind} {change.name}", style)
        for detail in change.details:
            _line(console, f"    {detail}")
        if change.effect:
            _line(console, f"    {change.effect}", "dim")
    if not changes:
        _line(console, "no difference: Envoy would be told what it knows already", "green")
        return
    drained = [change.name for change in changes if change.drains]
    if not drained:
        _line(console, f"{len(changes)} changes, no listener is drained: no running stream is touched", "green")
        return
    counted = [f"{name} ({streams[name]} requests under way)" if name in streams else name for name in drained]
    _line(console, f"{len(changes)} changes; streams at risk on: {', '.join(counted)}", "bold red")


def show_story(request: Request, story: Explanation, console: Console) -> None:
    """Top down, as the request goes; what is behind an arrow is the file, the object and the place that decide."""
    _line(console, f"{request.method} {request.path} for {request.authority}, from {request.caller}", "bold")
    _line(console, f"  listener      {story.listener}")
    if story.virtual_host:
        _line(console, f"  virtual host  {story.virtual_host}")
    for fact in story.passed_over:
        _line(console, f"  not taken     {fact.what}: {fact.value}{_arrow(fact)}", "dim")
    if story.door is not None:
        _line(console, f"  door          {story.door.verdict}: {story.door.why}", _VERDICT[story.door.verdict])
    _facts(story.facts, "  ", console)
    for target in story.targets:
        _line(console, f"  {target.percent:g} % → {target.cluster}", "bold")
        _facts(target.facts, "      ", console)
        _line(console, f"      access: {target.access.verdict}, {target.access.why}", _VERDICT[target.access.verdict])


def _facts(facts: Sequence[Fact], indent: str, console: Console) -> None:
    for fact in facts:
        _line(console, f"{indent}{fact.what}: {fact.value}{_arrow(fact)}")


def _arrow(fact: Fact) -> str:
    return f"   ← {fact.source}" if fact.source else ""


def _line(console: Console, text: str, style: str = "") -> None:
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
