"""`match` → Envoy's RouteMatch."""

from services.mesh.policy.virtual_service import Match, StringMatch
from services.mesh.translate.names import Json


def route_match(match: Match) -> Json:
    """All conditions of one `match` entry; none at all matches every path."""
    result: Json = _path(match.uri)
    if match.ignore_uri_case:
        result["case_sensitive"] = False
    headers = [_header(name, value) for name, value in sorted(match.headers.items())]
    headers += [_absent(name, value) for name, value in sorted(match.without_headers.items())]
    for name, condition in ((":method", match.method), (":authority", match.authority), (":scheme", match.scheme)):
        if condition is not None:
            headers.append(_header(name, condition))
    if headers:
        result["headers"] = headers
    if match.query_params:
        result["query_parameters"] = [
            {"name": name, "present_match": True}
            if value.is_presence
            else {"name": name, "string_match": string_match(value)}
            for name, value in sorted(match.query_params.items())
        ]
    return result


def _path(uri: StringMatch | None) -> Json:
    if uri is None or (uri.exact is None and uri.prefix is None and uri.regex is None):
        return {"prefix": "/"}
    if uri.exact is not None:
        return {"path": uri.exact}
    if uri.prefix is not None:
        return {"prefix": uri.prefix}
    return {"safe_regex": {"regex": uri.regex}}


def _header(name: str, value: StringMatch) -> Json:
    if value.is_presence:
        return {"name": name, "present_match": True}
    return {"name": name, "string_match": string_match(value)}


def _absent(name: str, value: StringMatch) -> Json:
    inverted = {**_header(name, value), "invert_match": True}
    return inverted if value.is_presence else {**inverted, "treat_missing_header_as_empty": True}


def string_match(value: StringMatch) -> Json:
    """exact, prefix or regex, in Envoy's words."""
    if value.exact is not None:
        return {"exact": value.exact}
    if value.prefix is not None:
        return {"prefix": value.prefix}
    return {"safe_regex": {"regex": value.regex}}
