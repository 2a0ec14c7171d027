"""`python -m services.mesh check`: everything that can be said about manifests without a cluster.

Three sieves for each folder: our strict models, the CustomResourceDefinitions with their CEL rules (where they are at
hand), and checks across objects. A component is checked on top of the base that it changes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from services.mesh import policy
from services.mesh.policy import DEFAULT_LIMITS, PolicyError, Problem, crds
from services.mesh.policy.base import Document
from services.mesh.policy.gateway_api import API_GROUP, GATEWAY_KINDS, check_gateway_api
from services.mesh.policy.kustomize import KUSTOMIZATION, Source, sources
from services.mesh.policy.loading import KINDS, read_object
from services.mesh.registry import Registry


@dataclass(frozen=True, slots=True)
class Verdict:
    """What there is to say about one folder."""

    folder: str
    objects: int
    problems: tuple[Problem, ...]

    @property
    def is_good(self) -> bool:
        """No errors; warnings may be there."""
        return not any(problem.severity == "error" for problem in self.problems)


def folders(root: Path) -> list[Path]:
    """Every folder under `root` that can be built: those with a kustomization."""
    return sorted(path.parent for path in root.rglob(KUSTOMIZATION))


def check(folder: Path, base: Path, registry: Registry, definitions: crds.Definitions) -> Verdict:
    """All mistakes in what `folder` builds; a component is built on `base`."""
    with tempfile.TemporaryDirectory() as scratch:
        built = _on_top(base, folder, Path(scratch)) if _is_component(folder) else folder
        problems: list[Problem] = []
        found = list(sources(built, DEFAULT_LIMITS, problems))
        if definitions:
            problems += _admission(found, definitions)
        if any(_is_gateway_api(source) for source in found):
            problems += _gateway_api(found, registry)
        else:
            problems += _local(built, registry)
        unique = tuple(dict.fromkeys(problems))  # two sieves may stumble over the same unreadable file
        return Verdict(str(folder), len(found), unique)


def _admission(found: Sequence[Source], definitions: crds.Definitions) -> Iterator[Problem]:
    for source in found:
        if isinstance(source.document, dict):
            for mistake in crds.mistakes(source.document, definitions):
                yield Problem(source.file, _label(source), mistake.path, f"a cluster refuses it: {mistake.message}")


def _local(built: Path, registry: Registry) -> tuple[Problem, ...]:
    try:
        return policy.check(policy.load(built), registry)
    except PolicyError as error:
        return error.problems


def _gateway_api(found: Sequence[Source], registry: Registry) -> list[Problem]:
    problems: list[Problem] = []
    items: list[Document] = []
    place: dict[int, Source] = {}
    for source in found:
        kinds = GATEWAY_KINDS if _is_gateway_api(source) else KINDS
        item = read_object(source.document, source.file, source.index, problems, kinds)
        if item is not None:
            items.append(item)
            place[id(item)] = source
    for item, path, message in check_gateway_api(items, registry):
        problems.append(Problem(place[id(item)].file, f"{item.kind}/{item.metadata.name}", path, message))
    return problems


def _is_gateway_api(source: Source) -> bool:
    document = source.document
    return isinstance(document, dict) and str(document.get("apiVersion", "")).startswith(f"{API_GROUP}/")


def _label(source: Source) -> str:
    metadata = source.document.get("metadata")
    name = metadata.get("name") if isinstance(metadata, dict) else None
    return f"{source.document.get('kind')}/{name}"[:300]


def _is_component(folder: Path) -> bool:
    try:
        content = yaml.safe_load((folder / KUSTOMIZATION).read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(content, dict) and content.get("kind") == "Component"


def _on_top(base: Path, component: Path, scratch: Path) -> Path:
    """An overlay of the two, written for this check."""
    overlay = {"resources": ["base"], "components": ["component"]}
    (scratch / "base").symlink_to(base.resolve(), target_is_directory=True)
    (scratch / "component").symlink_to(component.resolve(), target_is_directory=True)
    (scratch / KUSTOMIZATION).write_text(yaml.safe_dump(overlay))
    return scratch
