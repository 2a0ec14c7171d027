"""Enforces the bounds that the protos declare (`autoglm.validation.v1.bounds`) on every incoming message.

The interceptor calls `violations`; no service checks ranges by hand. A message type is compiled once into a flat list
of checks, so the price per request is a few microseconds plus one pass over large repeated fields.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from autoglm.validation.v1 import bounds_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

MAX_REPORTED = 5
OWN_PACKAGES = "autoglm."
"""Messages of other packages (Envoy's, health, reflection) declare no bounds; a walk would find nothing."""

_INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32,
    FieldDescriptor.CPPTYPE_INT64,
    FieldDescriptor.CPPTYPE_UINT32,
    FieldDescriptor.CPPTYPE_UINT64,
}
_FLOATS = {FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE}


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken bound: where, and in words what was seen and what is allowed."""

    path: str
    text: str

    def __str__(self) -> str:
        return f"{self.path}: {self.text}"


def violations(message: Message) -> list[Violation]:
    """The first broken bounds of `message`, at most MAX_REPORTED; empty when it keeps them all."""
    found: list[Violation] = []
    if not message.DESCRIPTOR.full_name.startswith(OWN_PACKAGES):
        return found
    for violation in _check(message, ""):
        found.append(violation)
        if len(found) == MAX_REPORTED:
            break
    return found


def bounds_of(field: FieldDescriptor) -> bounds_pb2.Bounds | None:
    """What the proto declares for `field`, or None."""
    options = field.GetOptions()
    return options.Extensions[bounds_pb2.bounds] if options.HasExtension(bounds_pb2.bounds) else None


@cache
def _fields(descriptor: Descriptor) -> tuple[tuple[FieldDescriptor, bounds_pb2.Bounds], ...]:
    return tuple((field, bounds_of(field) or bounds_pb2.Bounds()) for field in descriptor.fields)


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _check(message: Message, prefix: str) -> Iterator[Violation]:
    for field, bounds in _fields(message.DESCRIPTOR):
        path = f"{prefix}{field.name}"
        if field.is_repeated:
            yield from _check_repeated(field, bounds, getattr(message, field.name), path)
        elif field.has_presence:
            if message.HasField(field.name):
                yield from _check_value(field, bounds, getattr(message, field.name), path)
            elif bounds.required:
                yield Violation(path, "must be set")
        else:
            yield from _check_value(field, bounds, getattr(message, field.name), path)


def _check_repeated(field: FieldDescriptor, bounds: bounds_pb2.Bounds, values: Any, path: str) -> Iterator[Violation]:
    count = len(values)
    if bounds.HasField("max_items") and count > bounds.max_items:
        yield Violation(path, f"{count} elements, at most {bounds.max_items} are allowed")
        return
    if count < bounds.min_items:
        yield Violation(path, f"{count} elements, at least {bounds.min_items} are needed")
    if count == 0:
        return
    if _is_map(field):
        assert field.message_type is not None
        key, value = field.message_type.fields_by_name["key"], field.message_type.fields_by_name["value"]
        for name in values:
            yield from _check_value(key, bounds, name, f"{path} key")
            yield from _check_value(value, bounds, values[name], f"{path}[{str(name)[:32]!r}]")
    elif field.cpp_type in _INTEGERS:
        # Only the extremes can break a range, and min/max over the packed list run in C.
        yield from _check_value(field, bounds, max(values), f"{path}[]")
        yield from _check_value(field, bounds, min(values), f"{path}[]")
    else:
        for index, value in enumerate(values):
            yield from _check_value(field, bounds, value, f"{path}[{index}]")


def _check_value(field: FieldDescriptor, bounds: bounds_pb2.Bounds, value: Any, path: str) -> Iterator[Violation]:
    kind = field.cpp_type
    if kind == FieldDescriptor.CPPTYPE_MESSAGE:
        yield from _check(value, f"{path}.")
    elif kind in _INTEGERS:
        if bounds.HasField("max") and value > bounds.max:
            yield Violation(path, f"{value} is more than {bounds.max}")
        elif bounds.HasField("min") and value < bounds.min:
            yield Violation(path, f"{value} is less than {bounds.min}")
    elif kind in _FLOATS:
        if not math.isfinite(value):
            yield Violation(path, f"{value} is not a finite number")
        elif bounds.HasField("float_max") and value > bounds.float_max:
            yield Violation(path, f"{value:g} is more than {bounds.float_max:g}")
        elif bounds.HasField("float_min") and value < bounds.float_min:
            yield Violation(path, f"{value:g} is less than {bounds.float_min:g}")
    elif kind == FieldDescriptor.CPPTYPE_STRING:
        size = len(value) if isinstance(value, bytes) else len(value.encode())
        if bounds.HasField("max_bytes") and size > bounds.max_bytes:
            yield Violation(path, f"{size} bytes, at most {bounds.max_bytes} are allowed")
        elif size < bounds.min_bytes:
            yield Violation(path, f"{size} bytes, at least {bounds.min_bytes} are needed")
    elif (enum := field.enum_type) is not None and value not in enum.values_by_number:
        yield Violation(path, f"{value} is not a value of {enum.name}")
