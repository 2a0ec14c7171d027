"""The two kinds of patch an overlay may hold, on plain JSON: a strategic merge, and a list of operations (RFC 6902).

For objects without merge keys, such as Istio's, the strategic merge is JSON merge patch (RFC 7386) and the directive
`$patch: delete` or `replace`.
"""

from typing import Any

DIRECTIVE = "$patch"


class PatchError(Exception):
    """The patch does not fit the object."""


def merge(old: Any, change: Any) -> Any:
    """The object with the change; None when it is to be deleted. Lists are replaced, null removes."""
    if not isinstance(change, dict):
        return change
    directive = change.get(DIRECTIVE, "merge")
    rest = {key: value for key, value in change.items() if key != DIRECTIVE}
    if directive == "delete":
        return None
    if directive == "replace":
        return rest
    if directive != "merge":
        raise PatchError(f"{DIRECTIVE}: {directive} is not supported; use delete, replace or merge")
    result = dict(old) if isinstance(old, dict) else {}
    for key, value in rest.items():
        merged = None if value is None else merge(result.get(key), value)
        if merged is None:
            result.pop(key, None)
        else:
            result[key] = merged
    return result


def json_patch(old: Any, operations: list[Any]) -> Any:
    """add, remove, replace and test, one after the other, in place."""
    for operation in operations:
        if not isinstance(operation, dict) or not isinstance(operation.get("path"), str):
            raise PatchError(f"an operation has op, path and value; got {str(operation)[:80]!r}")
        _apply(old, operation)
    return old


def _apply(old: Any, operation: dict[str, Any]) -> None:
    kind, path = operation.get("op"), operation["path"]
    if kind not in ("add", "remove", "replace", "test"):
        raise PatchError(f"op {kind!r} is not supported; use add, remove, replace or test")
    parts = [part.replace("~1", "/").replace("~0", "~") for part in path.split("/")[1:]]
    if not parts:
        raise PatchError("a path names a part of the object, such as /spec/http/0")
    place = old
    for part in parts[:-1]:
        place = place[_key(place, part, path)]
    last = parts[-1]
    if kind == "add":
        if isinstance(place, list):
            place.insert(len(place) if last == "-" else _key(place, last, path, room=1), operation.get("value"))
        elif isinstance(place, dict):
            place[last] = operation.get("value")
        else:
            raise PatchError(f"{path}: nothing can be added there")
        return
    key = _key(place, last, path)
    if kind == "remove":
        del place[key]
    elif kind == "replace":
        place[key] = operation.get("value")
    elif place[key] != operation.get("value"):
        raise PatchError(f"{path}: is {str(place[key])[:80]!r}, not {str(operation.get('value'))[:80]!r}")


def _key(place: Any, part: str, path: str, room: int = 0) -> Any:
    if isinstance(place, dict) and part in place:
        return part
    if isinstance(place, list) and part.isdigit() and int(part) < len(place) + room:
        return int(part)
    raise PatchError(f"{path}: there is no {part}")
