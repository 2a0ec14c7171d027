"""A request as Envoy sees it before routing: its headers cleaned, its path normalised."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

OUTSIDE = "outside"
"""The caller who comes through the ingress."""


@dataclass(frozen=True, slots=True)
class Request:
    """`path` may carry a query. `caller` is `outside` or the name of a calling service; `claims` are those of the token
    that it brings to the door, None where it brings none."""

    path: str
    authority: str
    caller: str = OUTSIDE
    method: str = "POST"
    headers: Mapping[str, str] = field(default_factory=dict)
    claims: Mapping[str, Any] | None = None

    def cleaned(self, prefixes: Iterable[str]) -> Request:
        """Without the headers that the listener removes, and with the path that the routes are matched against."""
        dropped = tuple(prefixes)
        kept = {name.lower(): value for name, value in self.headers.items() if not name.lower().startswith(dropped)}
        return replace(self, path=normalised(self.path), headers=kept)

    def header(self, name: str) -> str | None:
        """A header's value, pseudo-headers included; None when it is absent."""
        pseudo = {":method": self.method, ":authority": self.authority, ":scheme": "http", ":path": self.path}
        return pseudo[name] if name in pseudo else self.headers.get(name.lower())

    @property
    def bare_path(self) -> str:
        """The path without query and fragment: all that path conditions look at."""
        return self.path.partition("#")[0].partition("?")[0]

    @property
    def query(self) -> dict[str, str]:
        """Parameters as they are written; of several equal ones the first counts."""
        found: dict[str, str] = {}
        for part in self.path.partition("#")[0].partition("?")[2].split("&"):
            name, _, value = part.partition("=")
            if name:
                found.setdefault(name, value)
        return found


def normalised(path: str) -> str:
    """`normalize_path`: dot segments are resolved and backslashes turned; nothing is decoded, no slashes are merged."""
    if "://" in path:  # an absolute form, as proxies send it
        parts = urlsplit(path)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    bare, mark, rest = path.partition("?")
    kept: list[str] = []
    segments = bare.replace("\\", "/").split("/")[1:]
    for number, segment in enumerate(segments):
        plain = segment.lower().replace("%2e", ".")
        is_last = number == len(segments) - 1
        if plain == "..":
            if kept:
                kept.pop()
        elif plain != ".":
            kept.append(segment)
            continue
        if is_last:
            kept.append("")
    return "/" + "/".join(kept) + mark + rest
