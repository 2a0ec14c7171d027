"""deploy/compose.yaml, without Docker: the Compose Specification's own types, strictly, and the names it relies on."""

from __future__ import annotations

import importlib
import re
from typing import Any

import compose_spec
import pytest
import yaml

from services.chassis.settings import ServiceSettings
from services.mesh import topology
from services.mesh.beside import BesideSettings
from services.mesh.members import health_name, parse
from tests.fakes.image import ROOT, instructions

COMPOSE = ROOT / "deploy" / "compose.yaml"
LEAST_S = 5
"""What a drain takes beyond its grace."""


def text(**variables: str) -> str:
    """The file with its ${VARIABLE:-default} filled in."""
    return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda found: variables.get(found[1], found[2]), COMPOSE.read_text())


SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(text())["services"]
OWN = [name for name in SERVICES if name != "envoy"]


def parsed(content: str) -> Any:
    """As the Compose Specification reads it. Raises on what it does not take."""
    merged = yaml.safe_dump(yaml.safe_load(content))  # YAML's merge keys are applied here: the parser leaves them alone
    compose = compose_spec.PyCompose.from_yaml(merged)
    compose.validate()
    return compose


def folder_of(name: str) -> str:
    return str(SERVICES[name]["build"]["args"]["SERVICE"])


def settings_of(name: str) -> type[ServiceSettings]:
    if name == "envoy":
        return BesideSettings
    kinds = vars(importlib.import_module(f"services.{folder_of(name)}.settings")).values()
    found = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, ServiceSettings)]
    return max(found, key=lambda kind: len(kind.model_fields))


def test_it_is_what_compose_takes() -> None:
    """Parsed by the Compose Specification's types; networks and volumes that services name are declared."""
    assert set(parsed(text()).to_dict()["services"]) == set(SERVICES)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("restart: unless-stopped", "restart: perhaps"),
        ("read_only: true\n  cap_drop", "read_onyl: true\n  cap_drop"),
        ("stop_grace_period: 40s", "stop_grace_period: soon"),
        ("networks: [mesh]", "networks: [mash]"),
    ],
)
def test_the_check_itself_sees_mistakes(old: str, new: str) -> None:
    """A wrong word, a misspelt key, a wrong duration and an undeclared network are found."""
    assert old in text()
    with pytest.raises(Exception, match=r"."):
        parsed(text().replace(old, new))


@pytest.mark.parametrize("name", list(SERVICES))
def test_every_variable_is_a_setting_and_its_value_is_taken(name: str) -> None:
    """A misspelt AUTOGLM_ variable would be ignored by the program; here it fails. Values pass the settings' bounds."""
    given = {key.removeprefix("AUTOGLM_").lower(): value for key, value in SERVICES[name]["environment"].items()}
    kind = settings_of(name)
    assert given.keys() <= kind.model_fields.keys(), sorted(given.keys() - kind.model_fields.keys())
    kind.model_validate_strings(given)


@pytest.mark.parametrize("name", list(SERVICES))
def test_containers_are_built_here_and_may_do_little(name: str) -> None:
    """The recipe and its argument exist; nothing is writable but volumes; no capability; the grace covers the drain."""
    service = SERVICES[name]
    context = (COMPOSE.parent / service["build"]["context"]).resolve()
    dockerfile = context / service["build"]["dockerfile"]
    assert context == ROOT and instructions(dockerfile)
    assert (ROOT / "services" / folder_of(name) / "__main__.py").exists()
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
    grace_s = int(service["stop_grace_period"].removesuffix("s"))
    assert grace_s >= float(service["environment"]["AUTOGLM_DRAIN_GRACE_S"]) + LEAST_S
    for volume in service.get("volumes", ()):
        if volume["type"] == "bind":
            assert (COMPOSE.parent / volume["source"]).exists() and volume["read_only"] is True
        else:
            assert volume["target"] == "/var/lib/autoglm"


@pytest.mark.parametrize("name", OWN)
def test_health_checks_ask_for_readiness(name: str) -> None:
    """Each asks for the gRPC service that says when the program takes calls, by a module that the image holds."""
    command = SERVICES[name]["healthcheck"]["test"]
    asked = health_name(folder_of(name).replace("_", "-"))
    assert command == ["CMD", "python", "-m", "services.chassis.probe", asked]
    protos = "\n".join(path.read_text() for path in (ROOT / "protos" / "autoglm" / folder_of(name)).rglob("*.proto"))
    package, _, word = asked.rpartition(".")
    assert f"package {package};" in protos and f"service {word} {{" in protos


def test_envoy_finds_everybody_by_the_name_of_the_container() -> None:
    """The members are the containers, each with the labels that its subset of the policy selects."""
    known = topology.load(ROOT / "deploy" / "local" / "mesh.yaml")
    groups = parse(SERVICES["envoy"]["environment"]["AUTOGLM_MEMBERS"], known)
    assert {group.host for group in groups} == set(OWN)
    for group in groups:
        assert folder_of(group.host) == group.service.replace("-", "_")
        labels = SERVICES[group.host]["environment"].get("AUTOGLM_LABELS", "")
        assert dict(pair.split("=") for pair in labels.split(",") if pair) == {
            key: value for key, value in group.labels.items() if key != "app"
        }
    outbound = SERVICES["envoy"]["environment"]["AUTOGLM_OUTBOUND_PORT"]
    assert {SERVICES[name]["environment"]["AUTOGLM_MESH_ADDRESS"] for name in OWN} == {f"envoy:{outbound}"}


def test_only_the_door_is_published_and_only_on_loopback() -> None:
    """Calls between containers are plain, so nothing but the ingress can be reached from outside."""
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {"envoy": ["127.0.0.1:8080:8080"]}
    assert SERVICES["envoy"]["environment"]["AUTOGLM_INGRESS_PORT"] == "8080"
