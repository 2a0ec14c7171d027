"""Turns validation errors into sentences an operator can act on: the path in the YAML, and what to do about it."""

import difflib
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import Tag, ValidationError

from services.mesh.policy.base import ISTIO_VERSION, Strict

_UNSUPPORTED = f"not supported by the local control plane (Istio {ISTIO_VERSION} has it)"
GATEWAY_API = "gateway.networking.k8s.io/"
ISTIO_KINDS = frozenset(
    {
        "ProxyConfig",
        "Sidecar",
        "TrafficExtension",
        "WasmPlugin",
        "WorkloadEntry",
        "WorkloadGroup",
    }
)


def explain(error: ValidationError, model: type[Strict]) -> Iterator[tuple[str, str]]:
    """(path, message) of every mistake in one object."""
    errors = error.errors(include_url=False, include_context=True)
    for item in errors:
        loc = item["loc"]
        if item["type"] == "too_short" and any(e["loc"][: len(loc)] == loc != e["loc"] for e in errors):
            continue  # pydantic counts only the valid items of a list; the invalid ones are reported themselves
        if item["type"] == "extra_forbidden":
            yield _path(loc), _extra(str(loc[-1]), _model_at(model, loc[:-1]))
        elif item["type"] == "missing":
            yield _path(loc), "required"
        else:
            yield _path(loc), _plain(item["msg"], item["input"])


def unsupported_kind(kind: object, known: tuple[str, ...], api_version: object = "") -> str:
    """Why an object of this kind was refused."""
    if isinstance(api_version, str) and api_version.startswith(GATEWAY_API):
        return (
            "the local control plane does not serve the Gateway API; it takes Gateway and VirtualService of "
            "networking.istio.io (`python -m services.mesh check` checks both)"
        )
    if isinstance(kind, str) and kind in ISTIO_KINDS:
        return _UNSUPPORTED
    return f"unknown kind {short(kind)}; supported are {', '.join(known)}"


def short(value: object) -> str:
    """A value that may be anything, as a few words."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _extra(name: str, owner: type[Strict] | None) -> str:
    if owner is None:
        return "unknown field"
    if name in owner.istio_has:
        return _UNSUPPORTED
    fields = [field.alias or key for key, field in owner.model_fields.items()]
    close = difflib.get_close_matches(name, [*fields, *owner.istio_has], n=1)
    return (
        f"unknown field; did you mean {close[0]}?" if close else f"unknown field; known are {', '.join(sorted(fields))}"
    )


def _plain(message: str, value: object) -> str:
    text = message[:1].lower() + message[1:]
    shown = repr(value)
    return text if isinstance(value, dict | list) or len(shown) > 80 or shown in text else f"{text} (got {shown})"


def _path(loc: tuple[int | str, ...]) -> str:
    path = ""
    for part in loc:
        if isinstance(part, str) and part.startswith("("):  # which of several models was meant: no part of the document
            continue
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path.removesuffix(".[key]")


def _model_at(model: type[Strict], loc: tuple[int | str, ...]) -> type[Strict] | None:
    """The model that `loc` leads to. List positions and dictionary keys do not change the model."""
    current = model
    annotation: Any = None
    for part in loc:
        if isinstance(part, str) and part.startswith("("):
            current = _tagged(annotation, part) or current
            continue
        for name, field in current.model_fields.items():
            if part == (field.alias or name):
                annotation = field.annotation
                inner = _strict_in(annotation)
                if inner is None:
                    return None
                current = inner
                break
    return current


def _tagged(annotation: Any, tag: str) -> type[Strict] | None:
    """The model of a union that is marked with `tag`."""
    for argument in get_args(annotation):
        if any(isinstance(mark, Tag) and mark.tag == tag for mark in getattr(argument, "__metadata__", ())):
            return _strict_in(argument)
    return None


def _strict_in(annotation: Any) -> type[Strict] | None:
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        return annotation
    for argument in get_args(annotation):
        found = _strict_in(argument)
        if found is not None:
            return found
    return None
