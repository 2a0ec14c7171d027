"""The rate limit's EnvoyFilter: one shape is understood, and whatever differs is refused with its place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.mesh.policy import PolicyError, check, load
from services.mesh.registry import Registry

COMPONENT = Path(__file__).resolve().parents[3] / "istio" / "components" / "ratelimit" / "rate-limit.yaml"
LIMIT = "spec.configPatches[1].patch.value.typed_per_filter_config.envoy.filters.http.local_ratelimit"


def document() -> Any:
    return yaml.safe_load(COMPONENT.read_text())


def limit(of: Any) -> Any:
    return of["spec"]["configPatches"][1]["patch"]["value"]["typed_per_filter_config"][
        "envoy.filters.http.local_ratelimit"
    ]


def said(directory: Path, *documents: Any) -> list[str]:
    """What the loader says of the documents, one line per mistake, without file and object."""
    (directory / "p.yaml").write_text(yaml.safe_dump_all(documents))
    try:
        load(directory)
    except PolicyError as error:
        return [f"{problem.path}: {problem.message}" for problem in error.problems]
    return []


def test_the_component_is_the_supported_shape(tmp_path: Path) -> None:
    """What the repository offers operators loads without a word."""
    assert said(tmp_path, document()) == []


def _patch(name: str, value: Any) -> Callable[[Any], None]:
    return lambda it: it["spec"]["configPatches"][1].__setitem__(name, value)


def _limit(name: str, value: Any) -> Callable[[Any], None]:
    return lambda it: limit(it).__setitem__(name, value)


def _twice(it: Any) -> None:
    limit(it)["descriptors"] += document_limit()["descriptors"]


def document_limit() -> Any:
    return limit(document())


@pytest.mark.parametrize(
    ("change", "path", "text"),
    [
        (lambda it: it["spec"]["configPatches"].pop(), "spec", "one filter and one VIRTUAL_HOST"),
        (lambda it: it["spec"]["configPatches"].pop(0), "spec", "one filter and one VIRTUAL_HOST"),
        (_patch("applyTo", "HTTP_FILTER"), "spec.configPatches[1]", "a filter is for HTTP_FILTER"),
        (_patch("applyTo", "LISTENER"), "spec.configPatches[1].applyTo", "HTTP_FILTER"),
        (
            lambda it: it["spec"]["configPatches"][0]["patch"].update(operation="MERGE"),
            "spec.configPatches[0]",
            "MERGE",
        ),
        (lambda it: it["spec"]["configPatches"][0]["match"].pop("listener"), "spec.configPatches[0]", "router"),
        (
            lambda it: it["spec"]["configPatches"][0]["patch"]["value"].update(name="envoy.filters.http.lua"),
            "spec.configPatches[0].patch.value",
            "must be a filter named",
        ),
        (_limit("descriptor", []), f"{LIMIT}.descriptor", "did you mean descriptors"),
        (_limit("rate_limited_as_resource_exhausted", False), f"{LIMIT}.rate_limited_as_resource_exhausted", "True"),
        (
            lambda it: limit(it).pop("always_consume_default_token_bucket"),
            f"{LIMIT}.always_consume_default_token_bucket",
            "required",
        ),
        (lambda it: limit(it).pop("token_bucket"), f"{LIMIT}.token_bucket", "required"),
        (
            lambda it: limit(it)["token_bucket"].update(fill_interval="2s"),
            LIMIT,
            "retry-after is shorter than the longest fill_interval",
        ),
        (lambda it: limit(it)["token_bucket"].update(max_tokens=0), f"{LIMIT}.token_bucket.max_tokens", "1"),
        (_twice, LIMIT, "a tenant is named twice"),
        (
            lambda it: limit(it)["descriptors"][0]["entries"][0].update(key="path"),
            f"{LIMIT}.descriptors[0].entries[0].key",
            "tenant",
        ),
        (
            lambda it: limit(it)["rate_limits"][0]["actions"][0]["request_headers"].update(header_name="x-api-key"),
            f"{LIMIT}.rate_limits[0].actions[0].request_headers.header_name",
            "x-autoglm-tenant",
        ),
    ],
)
def test_anything_else_is_refused_with_its_place(
    tmp_path: Path, change: Callable[[Any], None], path: str, text: str
) -> None:
    """A missing half, another filter, a misspelt field, a limit that cannot be kept as told: each by its path."""
    changed = document()
    change(changed)
    found = said(tmp_path, changed)
    assert any(line.startswith(f"{path}: ") and text in line for line in found), found


def test_two_rate_limits_are_one_too_many(tmp_path: Path) -> None:
    """Which of them would hold is not guessed."""
    other = document()
    other["metadata"]["name"] = "second"
    (tmp_path / "p.yaml").write_text(yaml.safe_dump_all([document(), other]))
    errors = [problem for problem in check(load(tmp_path), Registry(())) if problem.severity == "error"]
    assert [(problem.object, problem.path) for problem in errors] == [("EnvoyFilter/second", "spec")]
