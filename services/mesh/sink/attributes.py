"""OTLP's values as bounded texts."""

from __future__ import annotations

from collections.abc import Iterable

from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue

MAX_ATTRIBUTES = 64
MAX_TEXT = 1024


def attributes(pairs: Iterable[KeyValue]) -> dict[str, str]:
    """The first of them by name."""
    found: dict[str, str] = {}
    for pair in pairs:
        if len(found) >= MAX_ATTRIBUTES:
            break
        found[pair.key[:MAX_TEXT]] = text(pair.value)[:MAX_TEXT]
    return found


def text(value: AnyValue) -> str:
    """A value as a person would write it."""
    kind = value.WhichOneof("value")
    if kind is None:
        return ""
    if kind == "array_value":
        return ",".join(
            text(item) for item in value.array_value.values[:MAX_ATTRIBUTES] if not item.HasField("array_value")
        )
    if kind == "bool_value":
        return "true" if value.bool_value else "false"
    if kind == "bytes_value":
        return value.bytes_value[:MAX_TEXT].hex()
    return "{…}" if kind == "kvlist_value" else str(getattr(value, kind))
