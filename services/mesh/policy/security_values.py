"""Values of access policies: patterns with one asterisk, path templates, addresses, ports, accounts, public keys.

What Istio would drop in silence or match by its letters (an asterisk in the middle) is refused: in access control a
typing error must not become a rule that means something else.
"""

import ipaddress
import json
import re
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, StringConstraints
from pydantic_core import PydanticCustomError

from services.mesh.policy.base import MAX_LIST

MAX_KEYS_BYTES = 64 * 1024
_ACCOUNT = re.compile(r"([a-z0-9-]{1,63}/)?[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
_NAMESPACE = re.compile(r"[a-z0-9*-]{1,63}")
_SEGMENT = re.compile(r"[A-Za-z0-9._~!$&'()+,;=:@%-]*")


def one_wildcard(value: str) -> str:
    if "*" in value[1:-1] or (len(value) > 1 and value[0] == value[-1] == "*"):
        raise PydanticCustomError("wildcard", "one * at the beginning or the end is a wildcard, another is not")
    return value


def path(value: str) -> str:
    if "{" not in value and "}" not in value:
        return one_wildcard(value)
    segments = value.split("/")
    operators = [segment for segment in segments if segment in ("{*}", "{**}")]
    if segments[0] or any(
        segment not in ("{*}", "{**}") and not _SEGMENT.fullmatch(segment) for segment in segments[1:]
    ):
        raise PydanticCustomError("path", "in a path template {*} and {**} are whole segments, and there is no other *")
    if "{**}" in operators[:-1]:
        raise PydanticCustomError("path", "{**} must be the last operator of a path template")
    return value


def network(value: str) -> str:
    try:
        ipaddress.ip_network(value, strict=False)
    except ValueError:
        raise PydanticCustomError("network", "'{text}' is no IP address or range", {"text": value[:80]}) from None
    return value


def port(value: str) -> str:
    if not value.isascii() or not value.isdigit() or not 1 <= int(value) <= 65535:
        raise PydanticCustomError("port", "'{text}' is no port number in quotes", {"text": value[:20]})
    return value


def account(value: str) -> str:
    if not _ACCOUNT.fullmatch(value):
        raise PydanticCustomError("account", "'{text}' is neither name nor namespace/name", {"text": value[:80]})
    return value


def namespace(value: str) -> str:
    """Becomes part of a regular expression, so nothing else may be in it."""
    if not _NAMESPACE.fullmatch(value):
        raise PydanticCustomError("namespace", "'{text}' is no namespace", {"text": value[:80]})
    return one_wildcard(value)


def public_keys(value: str) -> str:
    if (reason := why_not_keys(value)) is not None:
        raise PydanticCustomError("jwks", "{reason}", {"reason": reason})
    return value


def why_not_keys(text: str) -> str | None:
    """Why `text` is no JSON Web Key Set of public keys, or None."""
    if len(text) > MAX_KEYS_BYTES:
        return f"longer than {MAX_KEYS_BYTES} bytes"
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return "not JSON"
    keys = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(keys, list) or not keys or not all(isinstance(key, dict) for key in keys):
        return "no key set: an object with a list of `keys` is needed"
    if any("d" in key or key.get("kty") == "oct" for key in keys):
        return "holds a secret key; only public keys belong here"
    if any(key.get("kty") not in ("RSA", "EC", "OKP") for key in keys):
        return "a key is of none of the types RSA, EC, OKP"
    return None


def url(value: str) -> str:
    try:
        parts = urlsplit(value)
        is_good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.username is None
        _ = parts.port
    except ValueError:
        is_good = False
    if not is_good:
        raise PydanticCustomError("url", "must be an http or https URL without credentials")
    return value


Text = Annotated[str, StringConstraints(min_length=1, max_length=1024, pattern=r"^[^\r\n\x00]*$")]
Pattern = Annotated[Text, AfterValidator(one_wildcard)]
Patterns = Annotated[tuple[Pattern, ...], Field(min_length=1, max_length=MAX_LIST)]
Paths = Annotated[tuple[Annotated[Text, AfterValidator(path)], ...], Field(min_length=1, max_length=MAX_LIST)]
Networks = Annotated[tuple[Annotated[Text, AfterValidator(network)], ...], Field(min_length=1, max_length=MAX_LIST)]
Ports = Annotated[tuple[Annotated[Text, AfterValidator(port)], ...], Field(min_length=1, max_length=MAX_LIST)]
Accounts = Annotated[tuple[Annotated[Text, AfterValidator(account)], ...], Field(min_length=1, max_length=16)]
Name = Annotated[Text, StringConstraints(max_length=256)]


Namespaces = Annotated[tuple[Annotated[Text, AfterValidator(namespace)], ...], Field(min_length=1, max_length=MAX_LIST)]
PublicKeys = Annotated[str, AfterValidator(public_keys)]
Url = Annotated[Text, AfterValidator(url)]
PortText = Annotated[str, AfterValidator(port)]
