"""A strict subset of Kustomize, enough for overlays of Istio objects: resources, components, patches.

Anything else in a kustomization.yaml is refused by name, so what is applied here is what `kubectl kustomize` gives
(tests/contract compares the two where kubectl is installed). Istio's objects have no merge keys: as in Kustomize, a
strategic patch merges mappings and replaces lists.

A folder without kustomization, or with one that only lists the files beside it, is read file by file.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from services.mesh.policy.patching import PatchError, json_patch, merge
from services.mesh.policy.problems import Problem
from services.mesh.policy.reading import SUFFIXES, Limits, documents, parse, shown

KUSTOMIZATION = "kustomization.yaml"
MAX_DEPTH = 8
_NOT_POLICY = {KUSTOMIZATION, "kustomization.yml"}
_VERSIONS = {"Kustomization": "kustomize.config.k8s.io/v1beta1", "Component": "kustomize.config.k8s.io/v1alpha1"}
_KEYS = {"apiVersion", "kind", "resources", "components", "patches"}
_PATCH_KEYS = {"path", "patch", "target"}
_TARGET_KEYS = {"group", "version", "kind", "name", "namespace"}


@dataclass(slots=True)
class Source:
    """One object, where it came from, and its number in that file."""

    document: Any
    file: str
    index: int


class _Wrong(Exception):
    """A kustomization that cannot be followed; the text says why."""


def sources(directory: Path, limits: Limits, problems: list[Problem]) -> Iterator[Source]:
    """All objects of the folder, overlays applied. Mistakes go to `problems`."""
    if not _is_overlay(directory, limits):
        for path in _files(directory, limits, problems):
            yield from _read(path, limits, problems)
        return
    try:
        yield from _build(directory.resolve(), [], limits, problems, ())
    except _Wrong as wrong:
        problems.append(Problem(shown(directory / KUSTOMIZATION), "", "", str(wrong)))


def folders(directory: Path, limits: Limits) -> list[Path]:
    """Every folder whose files matter, for whoever waits for changes. Mistakes are nobody's business here."""
    found: list[Path] = []
    waiting = [directory.resolve()]
    while waiting and len(found) < limits.files:
        here = waiting.pop()
        if here in found or not here.is_dir():
            continue
        found.append(here)
        content = _quietly(here, limits)
        for entry in (*_texts(content, "resources"), *_texts(content, "components")):
            if (here / entry).is_dir():
                waiting.append((here / entry).resolve())
    return found


def _is_overlay(directory: Path, limits: Limits) -> bool:
    if not (directory / KUSTOMIZATION).is_file():
        return False
    content = _quietly(directory, limits)
    plain = all((directory / entry).is_file() for entry in _texts(content, "resources"))
    return not plain or bool(content.keys() - {"apiVersion", "kind", "resources"}) or not content


def _build(
    directory: Path, under: list[Source], limits: Limits, problems: list[Problem], above: tuple[Path, ...]
) -> list[Source]:
    """`under` and what the folder adds, with its patches applied to all of it."""
    if directory in above or len(above) >= MAX_DEPTH:
        raise _Wrong(f"{shown(directory)} is part of itself, or nested deeper than {MAX_DEPTH}")
    content = _content(directory, limits)
    found = list(under)
    for entry in _texts(content, "resources"):
        path = _inside(directory, entry)
        if path.is_dir():
            found += _build(path.resolve(), [], limits, problems, (*above, directory))
        else:
            found += _read(path, limits, problems)
    for entry in _texts(content, "components"):
        found = _build(_inside(directory, entry).resolve(), found, limits, problems, (*above, directory))
    listed = {(directory / entry).resolve() for entry in _texts(content, "resources")}
    for patch in _patches(content):
        if "path" in patch:
            listed.add((directory / str(patch["path"])).resolve())
        found = _patched(found, patch, directory, limits)
    forgotten = sorted(path.name for path in _yaml_files(directory) if path.resolve() not in listed)
    if forgotten:
        raise _Wrong(f"{shown(directory)}: {', '.join(forgotten)} is not listed in {KUSTOMIZATION}, so it does nothing")
    return found


def _content(directory: Path, limits: Limits) -> dict[str, Any]:
    path = directory / KUSTOMIZATION
    try:
        with path.open("rb") as stream:
            raw = stream.read(limits.file_bytes + 1)
        loaded = parse(raw[: limits.file_bytes].decode("utf-8"), limits)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise _Wrong(f"{shown(path)}: {' '.join(str(error).split())}") from None
    content = loaded[0] if len(loaded) == 1 else None
    if not isinstance(content, dict):
        raise _Wrong(f"{shown(path)}: holds {len(loaded)} documents, one mapping is expected")
    if unknown := sorted(str(key) for key in content.keys() - _KEYS):
        known = ", ".join(sorted(_KEYS))
        raise _Wrong(f"{shown(path)}: {', '.join(unknown)} is not supported here; supported are {known}")
    kind = content.get("kind", "Kustomization")
    if content.get("apiVersion", _VERSIONS.get(str(kind))) != _VERSIONS.get(str(kind)):
        raise _Wrong(f"{shown(path)}: apiVersion and kind must be one of {_VERSIONS}")
    for key in ("resources", "components", "patches"):
        if not isinstance(content.get(key, []), list):
            raise _Wrong(f"{shown(path)}: {key} must be a list")
    return content


def _quietly(directory: Path, limits: Limits) -> dict[str, Any]:
    try:
        return _content(directory, limits)
    except _Wrong:
        return {}


def _texts(content: dict[str, Any], key: str) -> list[str]:
    return [entry for entry in content.get(key, []) if isinstance(entry, str)]


def _patches(content: dict[str, Any]) -> list[dict[str, Any]]:
    patches = content.get("patches", [])
    for patch in patches:
        if not isinstance(patch, dict) or patch.keys() - _PATCH_KEYS or ("path" in patch) == ("patch" in patch):
            raise _Wrong(f"patches: each has path or patch, and perhaps a target; got {str(patch)[:80]!r}")
    return list(patches)


def _inside(directory: Path, entry: str) -> Path:
    """Files lie in the folder or below it, as Kustomize demands; folders may be anywhere on this machine."""
    path = directory / entry
    if "://" in entry or Path(entry).is_absolute() or not path.exists():
        raise _Wrong(f"{shown(directory)}: {entry} is neither a file nor a folder here")
    if path.is_file() and not path.resolve().is_relative_to(directory):
        raise _Wrong(f"{shown(directory)}: the file {entry} lies outside; name its folder instead")
    return path


def _patched(found: list[Source], patch: dict[str, Any], directory: Path, limits: Limits) -> list[Source]:
    label = str(patch.get("path", "an inline patch"))
    try:
        text = patch["patch"] if "patch" in patch else _inside(directory, str(patch["path"])).read_text("utf-8")
        changes = parse(text, limits)
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise _Wrong(f"{shown(directory)}: {label}: {' '.join(str(error).split())}") from None
    for change in changes:
        found = _changed(found, change, patch.get("target"), f"{shown(directory)}: {label}")
    return found


def _changed(found: list[Source], change: Any, target: Any, label: str) -> list[Source]:
    if target is None:
        if not isinstance(change, dict):
            raise _Wrong(f"{label}: a list of operations needs a target")
        target = _named_by(change)
        if "/" not in str(change.get("apiVersion", "")) or str(change["apiVersion"]).startswith("apps/"):
            raise _Wrong(f"{label}: only custom resources can be patched, not {change.get('apiVersion')}")
    elif not isinstance(target, dict) or target.keys() - _TARGET_KEYS:
        raise _Wrong(f"{label}: a target has only {', '.join(sorted(_TARGET_KEYS))}")
    chosen = [source for source in found if _is_meant(source.document, target)]
    if not chosen:
        raise _Wrong(f"{label}: no object is {target}")
    kept = []
    for source in found:
        if source in chosen:
            try:
                old = copy.deepcopy(source.document)
                new = json_patch(old, change) if isinstance(change, list) else merge(old, _body(change))
            except PatchError as error:
                raise _Wrong(f"{label}: {error}") from None
            if new is None:
                continue
            source = Source(new, source.file, source.index)
        kept.append(source)
    return kept


def _named_by(change: dict[str, Any]) -> dict[str, Any]:
    """What a strategic patch says of its own target."""
    metadata = change.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    group, _, version = str(change.get("apiVersion", "")).rpartition("/")
    named = {"group": group, "version": version, "kind": change.get("kind"), "name": metadata.get("name")}
    named = {key: re.escape(str(value)) if key == "name" else value for key, value in named.items()}
    if "namespace" in metadata:
        named["namespace"] = re.escape(str(metadata["namespace"]))
    return named


def _body(change: dict[str, Any]) -> dict[str, Any]:
    """A patch with a target may carry any name; it never renames."""
    body = {key: value for key, value in change.items() if key not in ("apiVersion", "kind", "metadata")}
    metadata = change.get("metadata")
    if isinstance(metadata, dict):
        body["metadata"] = {key: value for key, value in metadata.items() if key not in ("name", "namespace")}
    return body


def _is_meant(document: Any, target: dict[str, Any]) -> bool:
    if not isinstance(document, dict) or not isinstance(document.get("metadata"), dict):
        return False
    group, _, version = str(document.get("apiVersion", "")).rpartition("/")
    theirs = {"group": group, "version": version, "kind": document.get("kind")}
    if any(str(target[key]) != str(theirs[key]) for key in theirs if key in target):
        return False
    metadata = document["metadata"]
    return all(
        re.fullmatch(str(target[key]), str(metadata.get(key, "default" if key == "namespace" else "")))
        for key in ("name", "namespace")
        if key in target
    )


def _read(path: Path, limits: Limits, problems: list[Problem]) -> Iterator[Source]:
    name = shown(path)
    for index, document in enumerate(documents(path, name, limits, problems)):
        yield Source(document, name, index)


def _yaml_files(directory: Path) -> list[Path]:
    return [
        path
        for path in directory.iterdir()
        if path.suffix in SUFFIXES and path.name not in _NOT_POLICY and path.is_file()
    ]


def _files(directory: Path, limits: Limits, problems: list[Problem]) -> list[Path]:
    if not directory.is_dir():
        problems.append(Problem(shown(directory), "", "", "not a folder"))
        return []
    paths = sorted(
        path
        for path in directory.rglob("*")
        if path.suffix in SUFFIXES and path.name not in _NOT_POLICY and path.is_file()
    )
    if len(paths) > limits.files:
        problems.append(Problem(shown(directory), "", "", f"{len(paths)} files; at most {limits.files} are read"))
        return []
    return paths
