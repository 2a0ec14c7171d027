"""What changes in Envoy between two snapshots, resource by resource, in words an operator thinks in.

Pure. Streams at risk are those on a listener that changes: Envoy drains it and ends what still runs when the drain time
is over. Everything else changes under running streams without touching them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from services.mesh.translate import Snapshot
from services.mesh.translate.names import Json

MAX_DETAILS = 40
Kind = Literal["listener", "virtual host", "route", "cluster", "endpoints", "bootstrap"]
How = Literal["added", "removed", "changed"]


@dataclass(frozen=True, slots=True)
class Change:
    """One resource. `effect` says what it means for requests that run or come."""

    kind: Kind
    name: str
    how: How
    details: tuple[str, ...] = ()
    effect: str = ""
    drains: bool = False


def differences(old: Snapshot, new: Snapshot) -> tuple[Change, ...]:
    """All changes, the dangerous ones first: bootstrap, listeners, clusters, routes, endpoints."""
    return (
        *_bootstrap(old.bootstrap, new.bootstrap),
        *_resources("listener", old.listeners, new.listeners, _listener),
        *_resources("cluster", old.clusters, new.clusters, _cluster),
        *_routes(old.routes, new.routes),
        *_resources("endpoints", old.endpoints, new.endpoints, _endpoints, key="cluster_name"),
    )


def at_risk(changes: Sequence[Change]) -> tuple[str, ...]:
    """The listeners whose running streams end when the drain time is over."""
    return tuple(change.name for change in changes if change.drains)


def _bootstrap(old: Json, new: Json) -> Iterator[Change]:
    if details := _paths(old, new):
        yield Change("bootstrap", "Envoy", "changed", details, "needs a restart of the mesh: it is read at start only")


def _listener(how: How) -> tuple[str, bool]:
    if how == "added":
        return "begins to listen", False
    return "drained: running streams on it may finish until the drain time is over, then they are cut", True


def _cluster(how: How) -> tuple[str, bool]:
    return {
        "added": "warmed up before any route names it",
        "removed": "leaves after the routes have let go; streams on it go on",
        "changed": "new requests get new connections; streams on the old ones go on",
    }[how], False


def _endpoints(how: How) -> tuple[str, bool]:
    return "in force at once; streams to an endpoint that leaves go on", False


def _resources(
    kind: Kind,
    old: Sequence[Json],
    new: Sequence[Json],
    effect: Callable[[How], tuple[str, bool]],
    key: str = "name",
) -> Iterator[Change]:
    before, after = ({item[key]: item for item in items} for items in (old, new))
    for name in sorted(before.keys() | after.keys()):
        how: How = "changed" if name in before and name in after else "added" if name in after else "removed"
        details = _paths(before[name], after[name]) if how == "changed" else ()
        if how == "changed" and not details:
            continue
        said, drains = effect(how)
        yield Change(kind, name, how, details, said, drains)


def _routes(old: Sequence[Json], new: Sequence[Json]) -> Iterator[Change]:
    before, after = ({item["name"]: item for item in items} for items in (old, new))
    for name in sorted(before.keys() | after.keys()):
        hosts_before, hosts_after = (
            {host["name"]: host for host in side.get(name, {"virtual_hosts": []})["virtual_hosts"]}
            for side in (before, after)
        )
        for host in sorted(hosts_before.keys() | hosts_after.keys()):
            label = f"{name}: {host}"
            if host not in hosts_after or host not in hosts_before:
                how: How = "removed" if host in hosts_before else "added"
                yield Change("virtual host", label, how, (), "takes effect for new requests")
                continue
            first, second = hosts_before[host], hosts_after[host]
            rest = _paths(*({k: v for k, v in side.items() if k != "routes"} for side in (first, second)))
            if rest:
                yield Change("virtual host", label, "changed", rest, "takes effect for new requests")
            yield from _host_routes(label, first["routes"], second["routes"])


def _host_routes(label: str, old: Sequence[Json], new: Sequence[Json]) -> Iterator[Change]:
    """Routes of one host by what they match; a moved route is a change of order."""
    before, after = (_by_match(routes) for routes in (old, new))
    for key in sorted(before.keys() | after.keys()):
        name = f"{label}: {(after.get(key) or before[key])[1]['name']} ({key})"
        if key not in after or key not in before:
            yield Change("route", name, "removed" if key in before else "added", (), "takes effect for new requests")
            continue
        first, second = before[key][1], after[key][1]
        weights = tuple(_weights(first, second))
        hidden = {"metadata", "name"}  # where a route comes from is no difference in what it does
        details = _paths(*({k: v for k, v in side.items() if k not in hidden} for side in (first, second)))
        if weights:
            details = (*weights, *(text for text in details if not text.startswith("route.weighted_clusters")))
        if details:
            yield Change(
                "route", name, "changed", details, "takes effect for new requests; streams stay where they are"
            )
    kept = [key for key in before if key in after]
    if kept != [key for key in after if key in before]:
        yield Change("route", label, "changed", ("the order of the routes",), "the first that matches is taken")


def _by_match(routes: Sequence[Json]) -> dict[str, tuple[int, Json]]:
    found: dict[str, tuple[int, Json]] = {}
    for number, route in enumerate(routes):
        found.setdefault(_match_words(route["match"]), (number, route))
    return found


def _match_words(match: Json) -> str:
    path = match.get("path") or (
        f"like {match['safe_regex']['regex']}" if "safe_regex" in match else f"{match.get('prefix')}*"
    )
    more = [item["name"] + _wanted(item) for item in (*match.get("headers", ()), *match.get("query_parameters", ()))]
    return " ".join([path, *more])


def _wanted(condition: Json) -> str:
    if "string_match" not in condition:
        return " absent" if condition.get("invert_match") else " present"
    wanted = next(iter(condition["string_match"].values()))
    sign = "≠" if condition.get("invert_match") else "="
    return f"{sign}{wanted['regex'] if isinstance(wanted, dict) else wanted}"


def _weights(old: Json, new: Json) -> Iterator[str]:
    """Each destination's share in percent, before and after."""
    before, after = (_shares(route.get("route", {})) for route in (old, new))
    for name in sorted(before.keys() | after.keys()):
        first, second = before.get(name, 0.0), after.get(name, 0.0)
        if first != second:
            yield f"{name}: {first:g} % → {second:g} %"


def _shares(action: Json) -> dict[str, float]:
    if "cluster" in action:
        return {action["cluster"]: 100.0}
    clusters = action.get("weighted_clusters", {}).get("clusters", [])
    total = sum(item["weight"] for item in clusters) or 1
    return {item["name"]: round(100 * item["weight"] / total, 2) for item in clusters}


def _paths(old: Any, new: Any) -> tuple[str, ...]:
    found = list(_walk(old, new, ""))
    if len(found) > MAX_DETAILS:
        found = [*found[:MAX_DETAILS], f"and {len(found) - MAX_DETAILS} more"]
    return tuple(found)


def _walk(old: Any, new: Any, path: str) -> Iterator[str]:
    if old == new:
        return
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted(old.keys() | new.keys()):
            yield from _walk(old.get(key, _NOTHING), new.get(key, _NOTHING), f"{path}.{key}" if path else str(key))
    elif isinstance(old, list | tuple) and isinstance(new, list | tuple):
        names_old, names_new = _names(old), _names(new)
        if names_old is not None and names_new is not None:
            yield from _walk(names_old, names_new, path)
            kept = [name for name in names_old if name in names_new]
            if kept != [name for name in names_new if name in names_old]:
                yield f"{path}: the order"
            return
        for number in range(max(len(old), len(new))):
            first, second = (side[number] if number < len(side) else _NOTHING for side in (old, new))
            yield from _walk(first, second, f"{path}[{number}]")
    else:
        yield f"{path}: {_short(old)} → {_short(new)}"


def _names(items: Sequence[Any]) -> dict[str, Any] | None:
    """A list of named things as a mapping, so that an insertion is one difference and not a shift of all."""
    if not all(isinstance(item, Mapping) and isinstance(item.get("name"), str) for item in items):
        return None
    named = {item["name"]: item for item in items}
    return named if len(named) == len(items) else None


def _short(value: Any) -> str:
    if value is _NOTHING:
        return "nothing"
    text = str(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


class _Nothing:
    """Stands for a key that is not there."""


_NOTHING = _Nothing()
