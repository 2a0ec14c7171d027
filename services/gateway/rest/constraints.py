"""What an answer must be, as REST callers say it: OpenAI's `response_format`, and the fields that vLLM's clients send.

The notations become one `Constraint` or a ValueError; whether a schema or grammar is right, the worker says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from services.gateway.requests import Constraint, Kind

MAX_CONSTRAINT_BYTES = 65_536
MAX_CHOICES = 1024
ANY_OBJECT = Constraint("json_schema", "")


def response_format(value: object) -> Constraint | None:
    """`{"type": "text" | "json_object" | "json_schema", …}`."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ValueError("must be an object with a type")
    match value.get("type"):
        case "text":
            return None
        case "json_object":
            return ANY_OBJECT
        case "json_schema":
            wrapped = value.get("json_schema")
            schema = wrapped.get("schema") if isinstance(wrapped, dict) else None
            if not isinstance(schema, dict):
                raise ValueError("needs json_schema.schema, an object")
            return _written("json_schema", schema)
    raise ValueError("type must be text, json_object or json_schema")


def structured_outputs(value: object) -> Constraint | None:
    """`{"json" | "regex" | "choice" | "grammar" | "json_object": …}` with exactly one of them."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ValueError("must be an object")
    given = {name: held for name, held in value.items() if held is not None and name in _READERS}
    if len(given) != 1:
        raise ValueError(f"must have exactly one of {', '.join(_READERS)}")
    [(name, held)] = given.items()
    return _READERS[name](held)


def guided_json(value: object) -> Constraint | None:
    return None if value is None else _written("json_schema", value)


def guided_regex(value: object) -> Constraint | None:
    return None if value is None else _text("regex", value)


def guided_grammar(value: object) -> Constraint | None:
    return None if value is None else _text("grammar", value)


def guided_choice(value: object) -> Constraint | None:
    """One of several texts."""
    if value is None:
        return None
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_CHOICES:
        raise ValueError(f"must be a list of 1 to {MAX_CHOICES} strings")
    if not all(isinstance(choice, str) and choice for choice in value):
        raise ValueError("each choice must be a string that is not empty")
    return _text("grammar", "start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in value))


def only_one(given: Mapping[str, Constraint | None]) -> Constraint | None:
    """The constraint among several fields, or ValueError when there is more than one."""
    named = {name: constraint for name, constraint in given.items() if constraint is not None}
    if len(named) > 1:
        raise ValueError(f"{' and '.join(named)} exclude each other")
    return next(iter(named.values()), None)


def _json_object(value: object) -> Constraint | None:
    return ANY_OBJECT if value else None


_READERS = {
    "json": guided_json,
    "regex": guided_regex,
    "choice": guided_choice,
    "grammar": guided_grammar,
    "json_object": _json_object,
}


def _written(kind: Kind, value: object) -> Constraint:
    if isinstance(value, str):
        return _text(kind, value)
    if not isinstance(value, dict):
        raise ValueError("must be a JSON schema, an object")
    try:
        return _text(kind, json.dumps(value, ensure_ascii=False, separators=(",", ":")))
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def _text(kind: Kind, value: object) -> Constraint:
    if not isinstance(value, str) or not value:
        raise ValueError("must be a string that is not empty")
    if (size := len(value.encode())) > MAX_CONSTRAINT_BYTES:
        raise ValueError(f"has {size} bytes, at most {MAX_CONSTRAINT_BYTES} are allowed")
    return Constraint(kind, value)
