"""The placement policy: weights and limits with a version, as data. Decisions name it; replays may swap it.

A policy file is JSON: {"version": "2", "weights": {"prefix": 3.0}, "max_endpoints": 2}. What it leaves out keeps the
default; a name it should not have is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

SCORERS = ("slots", "queue", "kv", "prefix", "prefill", "fresh")
"""Names of the scores, in the fixed order in which they are summed (a float sum depends on its order)."""

_DEFAULT_WEIGHTS = (2.0, 2.0, 0.5, 1.5, 0.5, 0.25)


class BadPolicy(ValueError):
    """The policy file does not say what it should; the text names the entry."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How much each score counts, and what is too old or too much."""

    version: str = "1"
    weights: tuple[float, ...] = _DEFAULT_WEIGHTS
    """One per SCORERS, 0 or more, not all 0."""
    max_endpoints: int = 3
    """Length of the ordered list: the choice and its fallbacks. 1 to 16."""
    stale_after_ns: int = 2_000_000_000
    """A load report older than this counts as less fresh, and not at all at twice the age."""
    prefill_scale_tokens: int = 4096
    """Pending prefill tokens that halve the prefill score."""

    def as_json(self) -> dict[str, Any]:
        """The form a policy file has."""
        return asdict(self) | {"weights": dict(zip(SCORERS, self.weights, strict=True))}


def policy_from(data: object) -> Policy:
    """The policy that parsed JSON describes. Raises BadPolicy."""
    if not isinstance(data, Mapping):
        raise BadPolicy("a policy is a JSON object")
    known = {field.name for field in fields(Policy)}
    if unknown := sorted(set(data) - known):
        raise BadPolicy(f"unknown entries {unknown}; known are {sorted(known)}")
    version = data.get("version", "")
    if not isinstance(version, str) or not 1 <= len(version) <= 64:
        raise BadPolicy("version must be a text of 1 to 64 characters")
    return Policy(
        version=version,
        weights=_weights(data.get("weights", {})),
        max_endpoints=_whole(data, "max_endpoints", Policy().max_endpoints, 1, 16),
        stale_after_ns=_whole(data, "stale_after_ns", Policy().stale_after_ns, 1, 2**62),
        prefill_scale_tokens=_whole(data, "prefill_scale_tokens", Policy().prefill_scale_tokens, 1, 2**31),
    )


def load_policy(path: str) -> Policy:
    """The policy in the file, or the default for an empty path. Raises BadPolicy and OSError."""
    if not path:
        return Policy()
    with open(path, encoding="utf-8") as file:
        try:
            data = json.loads(file.read(65536))
        except ValueError as error:
            raise BadPolicy(f"{path}: not JSON: {error}") from None
    return policy_from(data)


def _weights(data: object) -> tuple[float, ...]:
    if not isinstance(data, Mapping):
        raise BadPolicy("weights must be an object of numbers by score name")
    if unknown := sorted(set(data) - set(SCORERS)):
        raise BadPolicy(f"unknown scores {unknown}; known are {list(SCORERS)}")
    weights = []
    for name, default in zip(SCORERS, _DEFAULT_WEIGHTS, strict=True):
        value = data.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1000:
            raise BadPolicy(f"weight {name} must be a number from 0 to 1000, not {value!r}")
        weights.append(float(value))
    if sum(weights) <= 0:
        raise BadPolicy("at least one weight must be above 0")
    return tuple(weights)


def _whole(data: Mapping[str, Any], name: str, default: int, least: int, most: int) -> int:
    value = data.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise BadPolicy(f"{name} must be a whole number from {least} to {most}, not {value!r}")
    return value
