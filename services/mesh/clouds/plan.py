"""Which clouds there are (`deploy/local/clouds.yaml`), and the addresses and ports each gets in one run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from services.mesh.clouds.neighbours import Name
from services.mesh.clouds.wan import Distance, Way

MAX_FILE_BYTES = 64 * 1024
PORTS = {"ingress": 8080, "admin": 15000, "otlp": 4317, "eastwest": 15443, "federation": 15012}
"""What each cloud listens on where it has an address space of its own."""
BETWEEN = ("eastwest", "federation")
"""The ports that the other clouds may reach, each over a way of its own."""


class PlanError(Exception):
    """The plan cannot be used; the text has every reason."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class CloudSpec(_Strict):
    """One cloud: where it is, and its policy below the folder of all policy."""

    locality: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+){0,2}$", max_length=128)]
    policy: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*$", max_length=128)]


class WanSpec(_Strict):
    """The way between any two clouds."""

    one_way_ms: float = Field(ge=0, le=1000)
    jitter_ms: float = Field(0, ge=0, le=1000)
    seed: int = 0

    @property
    def distance(self) -> Distance:
        """The same in seconds."""
        return Distance(self.one_way_ms / 1e3, self.jitter_ms / 1e3, self.seed)


class PlanSpec(_Strict):
    """The file."""

    version: Literal[1]
    clouds: dict[Name, CloudSpec] = Field(min_length=2, max_length=8)
    wan: WanSpec


@dataclass(frozen=True, slots=True)
class Cloud:
    """One cloud of one run."""

    name: str
    locality: str
    policy: Path
    run_dir: Path
    address: str
    ports: Mapping[str, int]

    def at(self, port: str) -> tuple[str, int]:
        """Where that port is."""
        return (self.address, self.ports[port])


@dataclass(frozen=True, slots=True)
class Plan:
    """All clouds of one run, and the ways between them: from, to, kind."""

    clouds: tuple[Cloud, ...]
    ways: Mapping[tuple[str, str, str], Way]
    distance: Distance

    def environment(self, cloud: Cloud) -> dict[str, str]:
        """What a cloud's mesh is told, as its settings."""

        def others(kind: str) -> str:
            found = {
                there: way.at for (here, there, what), way in self.ways.items() if (here, what) == (cloud.name, kind)
            }
            return ",".join(f"{name}={host}:{port}" for name, (host, port) in sorted(found.items()))

        return {
            "AUTOGLM_RUN_DIR": str(cloud.run_dir),
            "AUTOGLM_POLICY_DIR": str(cloud.policy),
            "AUTOGLM_BIND": cloud.address,
            "AUTOGLM_CLOUD": cloud.name,
            "AUTOGLM_CA_DIR": str(cloud.run_dir.parent / "authority"),
            "AUTOGLM_LOCALITY": cloud.locality,
            "AUTOGLM_PEERS": others("federation"),
            "AUTOGLM_EASTWEST_GATEWAYS": others("eastwest"),
            **{f"AUTOGLM_{name.upper()}_PORT": str(number) for name, number in cloud.ports.items()},
        }


def load(path: Path) -> PlanSpec:
    """The file. Raises `PlanError`."""
    try:
        raw = path.read_bytes()[: MAX_FILE_BYTES + 1]
        if len(raw) > MAX_FILE_BYTES:
            raise PlanError(f"{path}: larger than {MAX_FILE_BYTES} bytes")
        return PlanSpec.model_validate(yaml.safe_load(raw))
    except ValidationError as error:
        lines = [f"{path}: {'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        raise PlanError("\n".join(lines)) from None
    except (OSError, yaml.YAMLError) as error:
        raise PlanError(f"{path}: {' '.join(str(error).split())}") from None


def plan(
    spec: PlanSpec,
    run_dir: Path,
    policy_root: Path,
    addresses: Mapping[str, str],
    middle: str,
    ports: Mapping[str, Iterator[int]],
    supply: Iterator[int],
) -> Plan:
    """Puts addresses and ports to the file. `ports` has a source for each cloud, `supply` one for `middle`."""
    clouds = tuple(
        Cloud(
            name,
            item.locality,
            (policy_root / item.policy).absolute(),
            (run_dir / name).absolute(),
            addresses[name],
            dict(zip(PORTS, ports[name], strict=False)),
        )
        for name, item in spec.clouds.items()
    )
    ways = {
        (here.name, there.name, kind): Way((middle, next(supply)), there.at(kind))
        for here, there in itertools.permutations(clouds, 2)
        for kind in BETWEEN
    }
    return Plan(clouds, ways, spec.wan.distance)
