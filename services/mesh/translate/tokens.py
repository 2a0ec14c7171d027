"""RequestAuthentication as Envoy's jwt_authn: a token that is there must be good, none at all passes.

Keys stand in the configuration itself: whoever loads the policy fetches those that it names by URL (see
`services/mesh/keys.py`). Where that has failed the keys here fit no token, so every token of the issuer is refused.
"""

import base64
import hashlib
import json
from collections.abc import Sequence

from cryptography.hazmat.primitives.asymmetric import ec

from services.mesh.policy.security import JwtRule
from services.mesh.translate.names import TYPE_URL, Json
from services.mesh.translate.rbac import JWT_FILTER, PAYLOAD

_SPACED = ("permission", "scope")
"""Claims that are lists in one text, always."""
_MISSING: Json = {"allow_missing": {}}


def token_filter(rules: Sequence[JwtRule]) -> list[Json]:
    """The filter, or nothing where no issuer is known."""
    if not rules:
        return []
    ordered = sorted(rules, key=lambda rule: rule.issuer)
    names = [f"origins-{number}" for number in range(len(ordered))]
    each: list[Json] = [{"requires_any": {"requirements": [{"provider_name": name}, _MISSING]}} for name in names]
    # Several issuers look in the same place: one of them must accept the token, or there must be none.
    requires = each[0]
    if len(each) > 1:
        every = {"requires_all": {"requirements": each}}
        requires = {"requires_any": {"requirements": [*({"provider_name": name} for name in names), every]}}
    config = {
        "@type": TYPE_URL + "envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication",
        "providers": {name: _provider(rule) for name, rule in zip(names, ordered, strict=True)},
        "rules": [{"match": {"prefix": "/"}, "requires": requires}],
        "bypass_cors_preflight": True,
    }
    return [{"name": JWT_FILTER, "typed_config": config}]


def _provider(rule: JwtRule) -> Json:
    keys = rule.jwks if rule.jwks is not None else keys_of_nobody(rule.jwks_uri or "")
    provider: Json = {
        "issuer": rule.issuer,
        "forward": rule.forward_original_token,
        "payload_in_metadata": PAYLOAD,
        "normalize_payload_in_metadata": {
            "space_delimited_claims": sorted({*_SPACED, *rule.space_delimited_claims}),
        },
        "local_jwks": {"inline_string": keys},
    }
    if rule.audiences:
        provider["audiences"] = list(rule.audiences)
    if rule.from_headers:
        provider["from_headers"] = [{"name": item.name, "value_prefix": item.prefix} for item in rule.from_headers]
    if rule.from_params:
        provider["from_params"] = list(rule.from_params)
    if rule.from_cookies:
        provider["from_cookies"] = list(rule.from_cookies)
    if rule.output_payload_to_header is not None:
        provider["forward_payload_header"] = rule.output_payload_to_header
    if rule.output_claim_to_headers:
        provider["claim_to_headers"] = [
            {"header_name": item.header, "claim_name": item.claim} for item in rule.output_claim_to_headers
        ]
    return provider


def keys_of_nobody(seed: str) -> str:
    """A key set that no token fits: a point of the curve made from a hash, whose private key nobody has ever known.

    Envoy wants at least one key, and equal policy must give equal bytes; so neither an empty set nor a random key.
    """
    digest = hashlib.sha256(seed.encode()).digest()
    while True:
        try:
            point = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), b"\x02" + digest).public_numbers()
            break
        except ValueError:  # about every second number is the abscissa of no point
            digest = hashlib.sha256(digest).digest()
    x, y = (base64.urlsafe_b64encode(value.to_bytes(32, "big")).rstrip(b"=").decode() for value in (point.x, point.y))
    return json.dumps(
        {"keys": [{"kty": "EC", "crv": "P-256", "alg": "ES256", "kid": digest.hex()[:16], "x": x, "y": y}]}
    )
