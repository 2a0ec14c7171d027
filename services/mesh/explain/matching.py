"""Envoy's way from an authority and a path to a route, done on the same configuration that Envoy gets.

tests/mesh/test_explain_on_envoy.py sends requests through a real Envoy and compares.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from services.mesh.explain.request import Request
from services.mesh.translate.names import Json


def virtual_host(configuration: Json, authority: str) -> Json | None:
    """Exact names first, then the longest `*.suffix`, then `*`."""
    host = authority.lower()
    if configuration.get("ignore_port_in_host_matching"):
        host = re.sub(r":\d+$", "", host)
    best: tuple[int, Json] | None = None
    for candidate in configuration["virtual_hosts"]:
        for domain in candidate["domains"]:
            rank = _rank(domain.lower(), host)
            if rank is not None and (best is None or rank > best[0]):
                best = (rank, candidate)
    return best[1] if best is not None else None


def first_match(routes: Sequence[Json], request: Request) -> tuple[int, Json] | None:
    """The first route whose conditions all hold, with its number."""
    for number, route in enumerate(routes):
        if not failed_conditions(route["match"], request):
            return number, route
    return None


def failed_conditions(match: Json, request: Request) -> list[str]:
    """The conditions that do not hold, in words; none: the route is taken."""
    failed = [] if _path_holds(match, request.bare_path) else [f"path is not {_path_words(match)}"]
    for condition in match.get("headers", ()):
        if not _header_holds(condition, request):
            wanted = "absent" if condition.get("invert_match") else _words(condition)
            failed.append(f"{condition['name']} is not {wanted}")
    for condition in match.get("query_parameters", ()):
        value = request.query.get(condition["name"])
        if value is None or ("string_match" in condition and not _text_holds(condition["string_match"], value)):
            failed.append(f"query parameter {condition['name']} is not {_words(condition)}")
    return failed


def _rank(domain: str, host: str) -> int | None:
    if domain == host:
        return 10_000
    if domain == "*":
        return 0
    if domain.startswith("*") and host.endswith(domain[1:]) and len(host) > len(domain) - 1:
        return len(domain)
    return None


def _path_holds(match: Json, path: str) -> bool:
    if "safe_regex" in match:
        return re.fullmatch(match["safe_regex"]["regex"], path) is not None
    wanted: str = match["path"] if "path" in match else match.get("prefix", "/")
    if match.get("case_sensitive") is False:
        path, wanted = path.lower(), wanted.lower()
    return path == wanted if "path" in match else path.startswith(wanted)


def _path_words(match: Json) -> str:
    if "safe_regex" in match:
        return f"like {match['safe_regex']['regex']}"
    return f"{match['path']}" if "path" in match else f"{match.get('prefix', '/')}*"


def _header_holds(condition: Json, request: Request) -> bool:
    value = request.header(condition["name"])
    inverted = bool(condition.get("invert_match"))
    if condition.get("present_match"):
        return (value is not None) is not inverted
    if value is None:
        if not condition.get("treat_missing_header_as_empty"):
            return False
        value = ""
    return _text_holds(condition["string_match"], value) is not inverted


def _text_holds(wanted: Json, value: str) -> bool:
    if "exact" in wanted:
        return bool(value == wanted["exact"])
    if "prefix" in wanted:
        return value.startswith(wanted["prefix"])
    return re.fullmatch(wanted["safe_regex"]["regex"], value) is not None


def _words(condition: Json) -> str:
    if "string_match" not in condition:
        return "present"
    wanted = condition["string_match"]
    if "exact" in wanted:
        return str(wanted["exact"])
    return f"{wanted['prefix']}*" if "prefix" in wanted else f"like {wanted['safe_regex']['regex']}"
