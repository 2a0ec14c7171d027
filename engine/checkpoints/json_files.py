"""JSON from strangers: bounded in bytes, in depth and in objects, without names that occur twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.checkpoints.errors import CheckpointError
from engine.checkpoints.files import read_bounded

MAX_OBJECTS = 100_000
"""JSON objects in one text. Parsed, an empty one takes thirty times its two bytes."""


def read_object(path: Path, max_bytes: int) -> dict[str, Any]:
    """The object a file holds. Raises CheckpointError, also when the file is larger than `max_bytes`."""
    try:
        data = read_bounded(path, max_bytes)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None
    return parse_object(data, path)


def parse_object(data: bytes, path: Path) -> dict[str, Any]:
    """The object that `data`, part of the file `path`, holds. Raises CheckpointError."""
    objects = 0

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal objects
        objects += 1
        if objects > MAX_OBJECTS:
            raise ValueError(f"more than {MAX_OBJECTS} objects")
        found = dict(pairs)
        if len(found) != len(pairs):
            for name, _ in pairs:
                if found.pop(name, pairs) is pairs:
                    raise ValueError(f"{name[:100]!r} occurs twice")
        return found

    try:
        value = json.loads(data.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: JSON is {type(value).__name__}; an object is needed")
    return value
