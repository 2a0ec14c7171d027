"""AuthorizationPolicy rules as Envoy's RBAC policies: `to` becomes permissions, `from` principals, `when` either.

The shapes are those istiod writes, so that a policy means the same in a cluster.
"""

import ipaddress
import re
from collections.abc import Callable, Sequence

from services.mesh.policy.security import AuthorizationPolicy, Condition, Operation, Rule, Source
from services.mesh.translate.names import TYPE_URL, Json

JWT_FILTER = "envoy.filters.http.jwt_authn"
PAYLOAD = "payload"
_TEMPLATE = "envoy.extensions.path.match.uri_template.v3.UriTemplateMatchConfig"
_ANY: Json = {"any": True}
_NEVER: Json = {"permissions": [{"not_rule": _ANY}], "principals": [{"not_id": _ANY}]}
_SPIFFE = "spiffe://"

Convert = Callable[[Sequence[str]], Json]
"""Some values → one matcher that is true where any of them matches."""


def rules_of(action: str, policies: Sequence[AuthorizationPolicy], port: int) -> Json:
    """All rules of policies with one action. `port` is the listener's number in the policies' eyes, 0 if unknown."""
    found: Json = {}
    for item in policies:
        key = f"ns[{item.metadata.namespace}]-policy[{item.metadata.name}]-rule"
        for number, rule in enumerate(item.spec.rules):
            found[f"{key}[{number}]"] = _rule(rule, item.metadata.namespace, port)
        if not item.spec.rules:
            found[f"{key}[0]"] = _NEVER
    return {"action": action, "policies": found}


def _rule(rule: Rule, namespace: str, port: int) -> Json:
    permissions, principals = [], []
    for condition in rule.when:
        is_permission, convert = _attribute(condition, namespace, port)
        if is_permission:
            permissions += _both(condition.values, condition.not_values, convert, "not_rule")
        else:
            principals += _both(condition.values, condition.not_values, convert, "not_id")
    operations: list[Operation | None] = [item.operation for item in rule.to] or [None]
    sources: list[Source | None] = [item.source for item in rule.from_] or [None]
    return {
        "permissions": [
            {"and_rules": {"rules": [*_operation(item, port), *permissions] or [_ANY]}} for item in operations
        ],
        "principals": [{"and_ids": {"ids": [*_source(item, namespace), *principals] or [_ANY]}} for item in sources],
    }


def _operation(item: Operation | None, port: int) -> list[Json]:
    if item is None:
        return []
    return [
        *_both(item.hosts, item.not_hosts, _some_rules(_host), "not_rule"),
        *_both(item.methods, item.not_methods, _some_rules(lambda value: _header(":method", value)), "not_rule"),
        *_both(item.paths, item.not_paths, _some_rules(_path), "not_rule"),
        *_both(item.ports, item.not_ports, _some_rules(lambda value: _port(value, port)), "not_rule"),
    ]


def _source(item: Source | None, namespace: str) -> list[Json]:
    if item is None:
        return []
    return [
        *_both(item.principals, item.not_principals, _some_ids(_principal), "not_id"),
        *_both(item.request_principals, item.not_request_principals, _request_principals, "not_id"),
        *_both(item.trust_domains, item.not_trust_domains, _some_ids(_trust_domain), "not_id"),
        *_both(
            item.service_accounts,
            item.not_service_accounts,
            _some_ids(lambda value: _account(value, namespace)),
            "not_id",
        ),
        *_both(item.namespaces, item.not_namespaces, _some_ids(_namespace), "not_id"),
        *_both(item.remote_ip_blocks, item.not_remote_ip_blocks, _some_ids(_network("remote_ip")), "not_id"),
        *_both(item.ip_blocks, item.not_ip_blocks, _some_ids(_network("direct_remote_ip")), "not_id"),
    ]


def _attribute(condition: Condition, namespace: str, port: int) -> tuple[bool, Convert]:
    """Whether the attribute belongs to the permission, and how its values are matched."""
    key = condition.key
    if key.startswith("request.headers["):
        name = key[len("request.headers[") : -1]
        return False, _some_ids(lambda value: _header(name, value))
    if key.startswith("request.auth.claims["):
        return False, _claim(key[len("request.auth.claims[") : -1].split("]["))
    match key:
        case "destination.ip":
            return True, _some_rules(_network("destination_ip"))
        case "destination.port":
            return True, _some_rules(lambda value: _port(value, port))
        case "connection.sni":
            return True, _some_rules(lambda value: {"requested_server_name": _text(value)})
        case "source.ip":
            return False, _some_ids(_network("direct_remote_ip"))
        case "remote.ip":
            return False, _some_ids(_network("remote_ip"))
        case "source.namespace":
            return False, _some_ids(_namespace)
        case "source.serviceAccount":
            return False, _some_ids(lambda value: _account(value, namespace))
        case "source.principal":
            return False, _some_ids(_principal)
        case "request.auth.principal":
            return False, _request_principals
        case "request.auth.audiences":
            return False, _claim(["aud"])
        case "request.auth.presenter":
            return False, _claim(["azp"])
    raise AssertionError(f"the model let {key} through")


def _both(values: Sequence[str], not_values: Sequence[str], convert: Convert, negation: str) -> list[Json]:
    found = [convert(values)] if values else []
    return [*found, {negation: convert(not_values)}] if not_values else found


def _some_rules(one: Callable[[str], Json]) -> Convert:
    return lambda values: {"or_rules": {"rules": [one(value) for value in values]}}


def _some_ids(one: Callable[[str], Json]) -> Convert:
    return lambda values: {"or_ids": {"ids": [one(value) for value in values]}}


def _text(value: str, prefix: str = "") -> Json:
    """A pattern as a string matcher; a lone asterisk wants at least one character."""
    if value == "*":
        return _regex(".+")
    if value.startswith("*"):
        # A prefix and an open middle need a regex. Istio leaves dots as they are; quoted, they match only dots.
        return _regex(f"{prefix}.*{re.escape(value[1:])}") if prefix else {"suffix": value[1:]}
    if value.endswith("*"):
        return {"prefix": prefix + value[:-1]}
    return {"exact": prefix + value}


def _regex(expression: str) -> Json:
    return {"safe_regex": {"regex": expression}}


def _header(name: str, value: str) -> Json:
    matcher: Json = {"present_match": True} if value == "*" else {"string_match": _text(value)}
    return {"header": {"name": name, **matcher}}


def _host(value: str) -> Json:
    matcher: Json = {"present_match": True} if value == "*" else {"string_match": {**_text(value), "ignore_case": True}}
    return {"header": {"name": ":authority", **matcher}}


def _path(value: str) -> Json:
    if "{" not in value:
        return {"url_path": {"path": _text(value)}}
    template = value.replace("{*}", "*").replace("{**}", "**")
    config = {"@type": TYPE_URL + _TEMPLATE, "path_template": template}
    return {"uri_template": {"name": "uri-template", "typed_config": config}}


def _port(value: str, port: int) -> Json:
    if not port:
        return {"destination_port": int(value)}
    return _ANY if int(value) == port else {"not_rule": _ANY}


def _network(field: str) -> Callable[[str], Json]:
    def one(value: str) -> Json:
        network = ipaddress.ip_network(value, strict=False)
        return {field: {"address_prefix": str(network.network_address), "prefix_len": network.prefixlen}}

    return one


def _authenticated(matcher: Json) -> Json:
    return {"authenticated": {"principal_name": matcher}}


def _principal(value: str) -> Json:
    return _authenticated(_text(value, _SPIFFE))


def _namespace(value: str) -> Json:
    return _authenticated(_regex(f".*/ns/{value.replace('*', '.*')}/.*"))


def _account(value: str, namespace: str) -> Json:
    owner, _, name = value.rpartition("/")
    return _authenticated(_regex(f"spiffe://.+/ns/{owner or namespace}/(.+/|)sa/{name}(/.+)?"))


def _trust_domain(value: str) -> Json:
    if value == "*":
        return _authenticated(_regex(".+"))
    if "*" in value:
        return _authenticated(_regex(f"spiffe://{re.escape(value).replace(re.escape('*'), '[^/]*')}/.*"))
    return _authenticated({"prefix": f"{_SPIFFE}{value}/"})


def _metadata(path: Sequence[str], value: Json) -> Json:
    steps = [{"key": key} for key in (PAYLOAD, *path)]
    return {"metadata": {"filter": JWT_FILTER, "path": steps, "value": value}}


def _claim(path: Sequence[str]) -> Convert:
    """A claim may be one text or a list of them."""

    def some(values: Sequence[str]) -> Json:
        texts = [{"string_match": _text(value)} for value in values]
        value = texts[0] if len(texts) == 1 else {"or_match": {"value_matchers": texts}}
        return _metadata(path, {"or_match": {"value_matchers": [{"list_match": {"one_of": value}}, value]}})

    return some


def _request_principals(values: Sequence[str]) -> Json:
    found = [
        {
            "and_ids": {
                "ids": [_metadata(["iss"], {"string_match": issuer}), _metadata(["sub"], {"string_match": subject})]
            }
        }
        for issuer, subject in map(_issuer_and_subject, values)
    ]
    return found[0] if len(found) == 1 else {"or_ids": {"ids": found}}


def _issuer_and_subject(value: str) -> tuple[Json, Json]:
    """`issuer/subject`, split at the last slash because an issuer may be a URL."""
    issuer, slash, subject = value.rpartition("/")
    if slash:
        return _text(issuer), _text(subject) if subject else {"exact": ""}
    if value == "*":
        return _text("*"), _text("*")
    if value.startswith("*"):
        return _text("*"), _text(value)
    return (_text(value), _text("*")) if value.endswith("*") else (_text(value), {"exact": ""})
