"""The EnvoyFilter for bodies of refusals: one shape is understood, and whatever differs is refused with its place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.mesh.policy import PolicyError, check, load
from services.mesh.registry import Registry, Service, ServicePort

BASE = Path(__file__).resolve().parents[3] / "istio" / "base"
CONFIG = "spec.configPatches[0].patch.value.typed_config.local_reply_config"


def documents() -> list[Any]:
    """The one for the door, and the one in front of the gateway."""
    return list(yaml.safe_load_all((BASE / "refusals.yaml").read_text()))


def mappers(of: Any) -> Any:
    return of["spec"]["configPatches"][0]["patch"]["value"]["typed_config"]["local_reply_config"]["mappers"]


def patch(of: Any) -> Any:
    return of["spec"]["configPatches"][0]


def said(directory: Path, *found: Any) -> list[str]:
    """What the loader says of the documents, one line per mistake, without file and object."""
    (directory / "p.yaml").write_text(yaml.safe_dump_all(found))
    try:
        load(directory)
    except PolicyError as error:
        return [f"{problem.path}: {problem.message}" for problem in error.problems]
    return []


def _error(it: Any) -> Any:
    return mappers(it)[1]["body_format_override"]["json_format"]["error"]


@pytest.mark.parametrize(
    ("change", "path", "text"),
    [
        (lambda it: mappers(it).pop(0), CONFIG, "the first of mappers must be for header content-type"),
        (lambda it: mappers(it).reverse(), CONFIG, "the first of mappers"),
        (lambda it: mappers(it)[0].update(status_code=500), CONFIG, "the first of mappers"),
        (lambda it: _error(it).update(message="at %UPSTREAM_HOST%"), f"{CONFIG}.mappers[1]", "%LOCAL_REPLY_BODY%"),
        (lambda it: _error(it).update(message="%RESPONSE_CODE_DETAILS%"), f"{CONFIG}.mappers[1]", "are taken"),
        (lambda it: _error(it).update(message="100 %"), f"{CONFIG}.mappers[1]", "a percent sign is %%"),
        (lambda it: _error(it).pop("param"), f"{CONFIG}.mappers[1]", "required"),
        (lambda it: _error(it).update(kind="x"), f"{CONFIG}.mappers[1]", "unknown field"),
        (lambda it: _error(it).update(type="bad"), f"{CONFIG}.mappers[1]", "server_error"),
        (lambda it: mappers(it)[1].update(status_code=200), f"{CONFIG}.mappers[1].status_code", "400"),
        (lambda it: mappers(it)[1].update(body={}), f"{CONFIG}.mappers[1].body", "unknown field"),
        (
            lambda it: mappers(it)[1]["filter"].update(response_flag_filter={"flags": ["UH"]}),
            f"{CONFIG}.mappers[1].filter",
            "exactly one condition",
        ),
        (
            lambda it: mappers(it)[1].update(filter={"response_flag_filter": {"flags": ["XX"]}}),
            f"{CONFIG}.mappers[1].filter.response_flag_filter.flags[0]",
            "UH",
        ),
        (
            lambda it: patch(it)["patch"]["value"]["typed_config"].update(server_name="x"),
            "spec.configPatches[0].patch.value.typed_config.server_name",
            "unknown field",
        ),
        (lambda it: patch(it).update(applyTo="HTTP_FILTER"), "spec.configPatches[0]", "for NETWORK_FILTER"),
        (lambda it: patch(it)["patch"].update(operation="INSERT_BEFORE"), "spec.configPatches[0]", "MERGE"),
        (lambda it: patch(it)["match"].pop("listener"), "spec.configPatches[0]", "match.listener is needed"),
        (lambda it: patch(it)["match"].update(context="SIDECAR_OUTBOUND"), "spec.configPatches[0].match", "GATEWAY"),
    ],
)
def test_anything_else_is_refused_with_its_place(
    tmp_path: Path, change: Callable[[Any], Any], path: str, text: str
) -> None:
    """JSON for gRPC callers, what callers may not see, another shape, another field of the connection manager."""
    for document in documents():
        change(document)
        (line,) = said(tmp_path, document)
        assert line.startswith(path) and text in line


def test_only_bodies_of_refusals_reach_the_sidecars(tmp_path: Path) -> None:
    """The other two kinds of EnvoyFilter are for the gateway."""
    limit = yaml.safe_load((BASE.parent / "components" / "ratelimit" / "rate-limit.yaml").read_text())
    for item in limit["spec"]["configPatches"]:
        item["match"]["context"] = "SIDECAR_INBOUND"
    assert all("only NETWORK_FILTER" in line for line in said(tmp_path, limit))


def test_a_second_one_for_the_same_workloads_is_refused(tmp_path: Path) -> None:
    """Envoy would have to guess the order; for other workloads it is another matter."""
    door, gateway = documents()
    assert said(tmp_path, door, gateway) == []
    again = yaml.safe_load(yaml.safe_dump(door))
    again["metadata"]["name"] = "more"
    registry = Registry((Service("gateway", "autoglm", (ServicePort("grpc", 50051, "grpc"),), {}, {"app": "gateway"}),))
    (tmp_path / "p.yaml").write_text(yaml.safe_dump_all([door, again, gateway]))
    errors = [problem for problem in check(load(tmp_path), registry) if problem.severity == "error"]
    assert [problem.object for problem in errors] == ["EnvoyFilter/more"]


def test_words_for_nobody_are_a_warning(tmp_path: Path) -> None:
    """A selector that fits no gateway, or no service."""
    door, gateway = documents()
    gateway["spec"]["workloadSelector"]["labels"] = {"app": "gatewey"}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump_all([door, gateway]))
    found = {problem.object: problem.message for problem in check(load(tmp_path), Registry(()))}
    assert "no service carries app=gatewey" in found["EnvoyFilter/refusals-of-gateway"]
    assert "no Gateway stands at istio=ingressgateway" in found["EnvoyFilter/refusals"]
