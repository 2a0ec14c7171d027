"""Reads a folder of YAML into a `Policy`, or says everything that is wrong with it in one `PolicyError`.

Policy files come from people and from pull requests, so they are read as untrusted input (see `reading`). A folder with
an overlay's kustomization.yaml is read as Kustomize would build it (see `kustomize`).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from services.mesh.policy.base import Document
from services.mesh.policy.destination_rule import DestinationRule
from services.mesh.policy.envoy_filter import EnvoyFilter
from services.mesh.policy.kustomize import sources
from services.mesh.policy.objects import ObjectKey, Policy, PolicyObject, key_of
from services.mesh.policy.others import Gateway, InferencePool, ServiceEntry
from services.mesh.policy.problems import PolicyError, Problem
from services.mesh.policy.reading import DEFAULT_LIMITS, Limits
from services.mesh.policy.refusals import GATEWAY_API, explain, short, unsupported_kind
from services.mesh.policy.security import AuthorizationPolicy, PeerAuthentication, RequestAuthentication
from services.mesh.policy.telemetry import Telemetry
from services.mesh.policy.virtual_service import VirtualService

Kind = TypeVar("Kind", bound=Document)

KINDS: dict[str, type[PolicyObject]] = {
    kind.__name__: kind
    for kind in (
        VirtualService,
        DestinationRule,
        ServiceEntry,
        InferencePool,
        Gateway,
        Telemetry,
        EnvoyFilter,
        PeerAuthentication,
        AuthorizationPolicy,
        RequestAuthentication,
    )
}


def load(directory: Path, limits: Limits = DEFAULT_LIMITS) -> Policy:
    """All policy under `directory`: its files in the order of their names, or what its kustomization gives.

    Raises `PolicyError`.
    """
    problems: list[Problem] = []
    found: dict[ObjectKey, PolicyObject] = {}
    files: dict[ObjectKey, str] = {}
    for source in sources(directory, limits, problems):
        if len(found) >= limits.objects:
            problems.append(Problem(source.file, "", "", f"more than {limits.objects} objects"))
            break
        item = _object(source.document, source.file, source.index, problems)
        if item is None:
            continue
        key = key_of(item)
        if key in found:
            label = f"{item.kind}/{item.metadata.name}"
            problems.append(Problem(source.file, label, "metadata.name", f"already defined in {files[key]}"))
            continue
        found[key] = item
        files[key] = source.file
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
        envoy_filters=tuple(item for item in kept if isinstance(item, EnvoyFilter)),
        peer_authentications=tuple(item for item in kept if isinstance(item, PeerAuthentication)),
        authorization_policies=tuple(item for item in kept if isinstance(item, AuthorizationPolicy)),
        request_authentications=tuple(item for item in kept if isinstance(item, RequestAuthentication)),
        files=files,
    )


def _object(document: Any, file: str, index: int, problems: list[Problem]) -> PolicyObject | None:
    return read_object(document, file, index, problems, KINDS)


def read_object(
    document: Any, file: str, index: int, problems: list[Problem], kinds: Mapping[str, type[Kind]]
) -> Kind | None:
    """One document by the model of its kind; what is wrong with it goes to `problems`."""
    if not isinstance(document, dict):
        problems.append(Problem(file, f"document {index + 1}", "", "not a Kubernetes object"))
        return None
    kind = document.get("kind")
    metadata = document.get("metadata")
    name = metadata.get("name", "?") if isinstance(metadata, dict) else "?"
    label = "/".join(part if isinstance(part, str) and len(part) <= 253 else short(part) for part in (kind, name))
    version = document.get("apiVersion")
    model = kinds.get(kind) if isinstance(kind, str) else None
    is_other = kinds is KINDS and isinstance(version, str) and version.startswith(GATEWAY_API)
    if model is None or is_other:
        problems.append(Problem(file, label, "kind", unsupported_kind(kind, tuple(kinds), version)))
        return None
    try:
        return model.model_validate_json(json.dumps(document, allow_nan=False))
    except ValidationError as error:
        problems.extend(Problem(file, label, path, text) for path, text in explain(error, model))
    except (TypeError, ValueError) as error:  # YAML has dates and .nan, JSON has neither
        problems.append(Problem(file, label, "", f"not expressible as JSON: {error}"))
    return None
