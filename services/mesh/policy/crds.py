"""What a cluster's API server would say: documents against CustomResourceDefinitions, schema and CEL rules.

The definitions are data files that are not part of this repository; `read` takes the folder they lie in. A rule that
cannot be evaluated counts as broken, never as kept. Not checked: metadata, and rules about changes (`oldSelf`).
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import cel
import jsonschema
import yaml

MAX_FILE_BYTES = 4 << 20
MAX_FILES = 256
Definitions = Mapping[tuple[str, str], dict[str, Any]]
"""(apiVersion, kind) → OpenAPI schema."""


class UnusableDefinitions(Exception):
    """The folder holds something that is no CustomResourceDefinition."""


def folder(repository: Path) -> Path:
    """Where definitions are looked for: `$AUTOGLM_SCHEMAS`, else `shared/schemas` beside the repository."""
    return Path(os.environ.get("AUTOGLM_SCHEMAS", repository.parent / "shared" / "schemas"))


def read(directory: Path) -> Definitions:
    """All definitions under `directory`; empty when there are none. Raises `UnusableDefinitions`."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for path in sorted(directory.glob("*/*.yaml"))[:MAX_FILES]:
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise UnusableDefinitions(f"{path}: larger than {MAX_FILE_BYTES} bytes")
            for crd in yaml.load_all(path.read_text(), _LOADER):
                spec = crd["spec"]
                for version in spec["versions"]:
                    key = (f"{spec['group']}/{version['name']}", spec["names"]["kind"])
                    found[key] = version["schema"]["openAPIV3Schema"]
        except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
            raise UnusableDefinitions(f"{path}: not a CustomResourceDefinition ({error!r})") from None
    return found


@dataclass(frozen=True, slots=True)
class Mistake:
    """What an API server would refuse: the path within the document, and why."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}"


def mistakes(document: Mapping[str, Any], definitions: Definitions) -> list[Mistake]:
    """Everything that is wrong with one document, unknown fields included."""
    key = (str(document.get("apiVersion")), str(document.get("kind")))
    if key not in definitions:
        kinds = sorted(version for version, kind in definitions if kind == key[1])
        known = f"; {key[1]} is served as {', '.join(kinds)}" if kinds else ""
        return [Mistake("apiVersion", f"no definition of {key[0]} {key[1]}{known}")]
    schema = definitions[key]
    parts = {name: inner for name, inner in schema["properties"].items() if name not in _ALWAYS}
    trimmed = {**schema, "properties": parts, "required": [n for n in schema.get("required", ()) if n in parts]}
    body = _with_defaults(trimmed, {name: value for name, value in document.items() if name not in _ALWAYS})
    validator = jsonschema.Draft202012Validator(_strict(trimmed))
    found = [Mistake(error.json_path.removeprefix("$."), error.message[:300]) for error in validator.iter_errors(body)]
    # Rules presume that the schema holds; on a document that breaks it they would only stumble.
    return found or list(_broken_rules(trimmed, body, ""))


def _strict(node: Any) -> Any:
    """Kubernetes' dialect as JSON Schema, with unknown fields refused."""
    if isinstance(node, list):
        return [_strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    result = {
        key: {name: _strict(inner) for name, inner in value.items()} if key == "properties" else _strict(value)
        for key, value in node.items()
        if not key.startswith("x-kubernetes")
    }
    if node.get("x-kubernetes-int-or-string"):
        result["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if node.get("nullable") and isinstance(node.get("type"), str):
        result["type"] = [node["type"], "null"]
    if isinstance(node.get("properties"), dict) and not node.get("x-kubernetes-preserve-unknown-fields"):
        if "type" in node:  # the alternatives inside oneOf repeat some properties and have no type
            result.setdefault("additionalProperties", False)
    return result


def _with_defaults(schema: Mapping[str, Any], value: Any) -> Any:
    """Defaults are filled in before rules are asked, as the API server does."""
    if isinstance(value, dict):
        filled = dict(value)
        for name, inner in schema.get("properties", {}).items():
            if name not in filled and "default" in inner:
                filled[name] = inner["default"]
            if name in filled:
                filled[name] = _with_defaults(inner, filled[name])
        return filled
    if isinstance(value, list):
        return [_with_defaults(schema.get("items", {}), item) for item in value]
    return value


def _broken_rules(schema: Mapping[str, Any], value: Any, path: str) -> Iterator[Mistake]:
    for rule in schema.get("x-kubernetes-validations", ()):
        if "oldSelf" in rule["rule"]:  # about a change; there is no older version here
            continue
        context = cel.Context(variables={"self": value})
        for name, function in _FUNCTIONS.items():
            context.add_function(name, function)
        try:
            verdict = cel.evaluate(rule["rule"], context)
        except (ValueError, TypeError, RuntimeError) as error:
            verdict = f"cannot validate: {error}"
        if verdict is not True:
            said = rule.get("message", rule["rule"])
            yield Mistake(path, said if verdict is False else f"{said} ({verdict})"[:300])
    if isinstance(value, dict):
        for name, item in value.items():
            inner = schema.get("properties", {}).get(name) or schema.get("additionalProperties")
            if isinstance(inner, dict):
                yield from _broken_rules(inner, item, f"{path}.{name}" if path else name)
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from _broken_rules(schema.get("items", {}), item, f"{path}[{number}]")


def _is_url(text: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None or text.startswith("/")


def _url(text: str) -> str:
    if not _is_url(text):
        raise ValueError(f"{text!r} is not a URL")
    return text


def _substring(text: str, start: int, end: int | None = None) -> str:
    stop = len(text) if end is None else end
    if not 0 <= start <= stop <= len(text):
        raise ValueError("substring out of range")
    return text[start:stop]


def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_ALWAYS = frozenset({"apiVersion", "kind", "metadata"})
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    # The part of Kubernetes' own CEL library that the definitions of Istio and the Gateway API use.
    "isURL": _is_url,
    "url": _url,
    "getScheme": lambda text: urlsplit(text).scheme,
    "isIP": _is_ip,
    "substring": _substring,
    "split": lambda text, by: text.split(by),
}
