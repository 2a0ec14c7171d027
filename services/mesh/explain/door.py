"""Whether the door would let a request in: its token, then the policies in front of everything behind it.

A token is taken as what it says: whether its signature, its times and its issuer's keys are good is not looked at. What
the door makes of it is: who may come in, and the headers that are written from its claims.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from services.mesh.explain.access import RBAC, Asked, Ruling, http_filters, rule
from services.mesh.explain.request import OUTSIDE, Request
from services.mesh.policy import Policy
from services.mesh.translate import Snapshot
from services.mesh.translate.names import Json
from services.mesh.translate.rbac import JWT_FILTER

MAX_TOKEN = 64 * 1024


class NoToken(Exception):
    """What was given is not a JSON Web Token; the text says why."""


def claims_of(token: str) -> dict[str, Any]:
    """What a token says, whoever signed it. Raises `NoToken`."""
    parts = token.strip().split(".")
    if len(parts) != 3 or len(token) > MAX_TOKEN:
        raise NoToken("a token is three parts with dots between them")
    try:
        claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    except (ValueError, RecursionError):
        raise NoToken("the middle part of the token is not JSON in base64url") from None
    if not isinstance(claims, dict):
        raise NoToken("the middle part of the token is no JSON object")
    return claims


def at_the_door(listener: Json, policy: Policy, request: Request) -> tuple[Ruling, Request]:
    """The ruling, and the request as the routes see it."""
    filters = http_filters(listener)
    tokens = next((item["typed_config"] for item in filters if item["name"] == JWT_FILTER), None)
    seen = request
    claims: Mapping[str, Any] = {}
    if tokens is not None:
        seen = _with_claims(tokens, request)
        refused = _refused(tokens, policy, request)
        if refused is not None:
            return refused, seen
        claims = _normalised(tokens, request.claims or {})
    rules = [item for item in filters if item["name"].startswith(RBAC)]
    port = listener.get("address", {}).get("socket_address", {}).get("port_value", 0)
    if not rules:
        return Ruling("allowed", "no AuthorizationPolicy speaks of the door"), seen
    return rule(rules, policy, Asked(request, port, principal="", claims=claims)), seen


def door_of(snapshot: Snapshot, request: Request) -> Json | None:
    """The door's listener, for who comes through it."""
    if request.caller != OUTSIDE:
        return None
    return next((item for item in snapshot.listeners if item["name"] == "ingress"), None)


def issuers(snapshot: Snapshot) -> Sequence[str]:
    """Whose tokens the door takes."""
    for listener in snapshot.listeners:
        if listener["name"] == "ingress":
            for item in http_filters(listener):
                if item["name"] == JWT_FILTER:
                    return [provider["issuer"] for provider in item["typed_config"]["providers"].values()]
    return []


def _refused(tokens: Json, policy: Policy, request: Request) -> Ruling | None:
    """What jwt_authn says: none at all passes, one of a stranger does not."""
    if request.claims is None:
        return None
    known = {provider["issuer"]: provider for provider in tokens["providers"].values()}
    issuer = str(request.claims.get("iss", ""))
    source = ", ".join(sorted(filter(None, (policy.file_of(item) for item in policy.request_authentications))))
    if issuer not in known:
        names = ", ".join(sorted(known))
        return Ruling("denied", f"401: the issuer of the token is {issuer or 'not named'}, known is {names} ({source})")
    wanted = set(known[issuer].get("audiences", ()))
    if wanted and not wanted & set(_texts(request.claims.get("aud"))):
        return Ruling("denied", f"401: the token is for none of {', '.join(sorted(wanted))} ({source})")
    return None


def _with_claims(tokens: Json, request: Request) -> Request:
    """Headers that stand for claims are the token's, whatever the caller wrote."""
    headers = dict(request.headers)
    for provider in tokens["providers"].values():
        for item in provider.get("claim_to_headers", ()):
            headers.pop(item["header_name"].lower(), None)
    for provider in tokens["providers"].values():
        if request.claims is not None and provider["issuer"] == request.claims.get("iss"):
            for item in provider.get("claim_to_headers", ()):
                value = request.claims.get(item["claim_name"])
                if isinstance(value, str | int | float):
                    headers[item["header_name"].lower()] = value if isinstance(value, str) else json.dumps(value)
    return replace(request, headers=headers)


def _normalised(tokens: Json, claims: Mapping[str, Any]) -> dict[str, Any]:
    spaced = {
        name
        for provider in tokens["providers"].values()
        for name in provider["normalize_payload_in_metadata"]["space_delimited_claims"]
    }
    return {
        name: value.split() if name in spaced and isinstance(value, str) else value for name, value in claims.items()
    }


def _texts(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else [str(value)] if value is not None else []
