"""Reads a folder of YAML into a `Policy`, or says everything that is wrong with it in one `PolicyError`.

Policy files come from people and from pull requests, so they are read as untrusted input: bounded in number, size and
depth, no aliases (a few lines of them can unfold to gigabytes), no repeated keys, no tags.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from services.mesh.policy.destination_rule import DestinationRule
from services.mesh.policy.objects import ObjectKey, Policy, PolicyObject, key_of
from services.mesh.policy.others import Gateway, InferencePool, ServiceEntry
from services.mesh.policy.problems import PolicyError, Problem
from services.mesh.policy.refusals import explain, short, unsupported_kind
from services.mesh.policy.security import AuthorizationPolicy, PeerAuthentication, RequestAuthentication
from services.mesh.policy.telemetry import Telemetry
from services.mesh.policy.virtual_service import VirtualService

_KINDS: dict[str, type[PolicyObject]] = {
    kind.__name__: kind
    for kind in (
        VirtualService,
        DestinationRule,
        ServiceEntry,
        InferencePool,
        Gateway,
        Telemetry,
        PeerAuthentication,
        AuthorizationPolicy,
        RequestAuthentication,
    )
}
_SUFFIXES = {".yaml", ".yml"}
_NOT_POLICY = {"kustomization.yaml", "kustomization.yml"}


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on what is read."""

    files: int = 64
    file_bytes: int = 256 * 1024
    objects: int = 512
    depth: int = 32
    nodes: int = 50_000
    """YAML events in one file."""
    problems: int = 200
    """Mistakes reported before giving up."""


DEFAULT_LIMITS = Limits()


def load(directory: Path, limits: Limits = DEFAULT_LIMITS) -> Policy:
    """All policy under `directory` (with sub-folders), in the order of the file names. Raises `PolicyError`."""
    problems: list[Problem] = []
    found: dict[ObjectKey, PolicyObject] = {}
    files: dict[ObjectKey, str] = {}
    for path in _files(directory, limits, problems):
        name = _shown(path)
        for index, document in enumerate(_documents(path, name, limits, problems)):
            if len(found) >= limits.objects:
                problems.append(Problem(name, "", "", f"more than {limits.objects} objects"))
                break
            item = _object(document, name, index, problems)
            if item is None:
                continue
            key = key_of(item)
            if key in found:
                label = f"{item.kind}/{item.metadata.name}"
                problems.append(Problem(name, label, "metadata.name", f"already defined in {files[key]}"))
                continue
            found[key] = item
            files[key] = name
    if problems:
        raise PolicyError(tuple(problems[: limits.problems]))
    return _policy(found.values(), files)


def _policy(items: Any, files: dict[ObjectKey, str]) -> Policy:
    kept = tuple(items)
    return Policy(
        virtual_services=tuple(item for item in kept if isinstance(item, VirtualService)),
        destination_rules=tuple(item for item in kept if isinstance(item, DestinationRule)),
        service_entries=tuple(item for item in kept if isinstance(item, ServiceEntry)),
        inference_pools=tuple(item for item in kept if isinstance(item, InferencePool)),
        gateways=tuple(item for item in kept if isinstance(item, Gateway)),
        telemetries=tuple(item for item in kept if isinstance(item, Telemetry)),
        peer_authentications=tuple(item for item in kept if isinstance(item, PeerAuthentication)),
        authorization_policies=tuple(item for item in kept if isinstance(item, AuthorizationPolicy)),
        request_authentications=tuple(item for item in kept if isinstance(item, RequestAuthentication)),
        files=files,
    )


def _files(directory: Path, limits: Limits, problems: list[Problem]) -> list[Path]:
    if not directory.is_dir():
        problems.append(Problem(_shown(directory), "", "", "not a folder"))
        return []
    paths = sorted(
        path
        for path in directory.rglob("*")
        if path.suffix in _SUFFIXES and path.name not in _NOT_POLICY and path.is_file()
    )
    if len(paths) > limits.files:
        problems.append(Problem(_shown(directory), "", "", f"{len(paths)} files; at most {limits.files} are read"))
        return []
    return paths


def _shown(path: Path) -> str:
    try:
        return str(path.resolve().relative_to(Path.cwd().resolve()))
    except ValueError:
        return str(path)


def _documents(path: Path, name: str, limits: Limits, problems: list[Problem]) -> Iterator[Any]:
    try:
        with path.open("rb") as stream:
            raw = stream.read(limits.file_bytes + 1)
        if len(raw) > limits.file_bytes:
            raise yaml.YAMLError(f"larger than {limits.file_bytes} bytes")
        text = raw.decode("utf-8")
        _refuse_traps(text, limits)
        documents = list(yaml.load_all(text, Loader=_UniqueKeys))  # a SafeLoader that also refuses repeated keys
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError) as error:
        problems.append(Problem(name, "", "", " ".join(str(error).split())))
        return
    found = [document for document in documents if document is not None]
    if not found:  # cut short by an editor or a full disk, sooner than meant
        problems.append(Problem(name, "", "", "holds no object; delete the file if that is what you mean"))
    yield from found


def _refuse_traps(text: str, limits: Limits) -> None:
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        line = event.start_mark.line + 1 if event.start_mark is not None else 0
        if count > limits.nodes:
            raise yaml.YAMLError(f"more than {limits.nodes} YAML nodes")
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError(f"line {line}: aliases are not allowed")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > limits.depth:
                raise yaml.YAMLError(f"line {line}: nested deeper than {limits.depth}")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


class _UniqueKeys(yaml.SafeLoader):
    """Plain safe loading drops the first of two equal keys without a word; here that is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                raise yaml.YAMLError(f"line {key.start_mark.line + 1}: keys must be text")
            if key.value in seen:
                raise yaml.YAMLError(f"line {key.start_mark.line + 1}: key '{key.value}' is repeated")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _object(document: Any, file: str, index: int, problems: list[Problem]) -> PolicyObject | None:
    if not isinstance(document, dict):
        problems.append(Problem(file, f"document {index + 1}", "", "not a Kubernetes object"))
        return None
    kind = document.get("kind")
    metadata = document.get("metadata")
    name = metadata.get("name", "?") if isinstance(metadata, dict) else "?"
    label = "/".join(part if isinstance(part, str) and len(part) <= 253 else short(part) for part in (kind, name))
    model = _KINDS.get(kind) if isinstance(kind, str) else None
    if model is None:
        problems.append(Problem(file, label, "kind", unsupported_kind(kind, tuple(_KINDS))))
        return None
    try:
        return model.model_validate_json(json.dumps(document, allow_nan=False))
    except ValidationError as error:
        problems.extend(Problem(file, label, path, text) for path, text in explain(error, model))
    except (TypeError, ValueError) as error:  # YAML has dates and .nan, JSON has neither
        problems.append(Problem(file, label, "", f"not expressible as JSON: {error}"))
    return None
