"""Our manifests and models against the schemas that a cluster would use: Istio's and the inference extension's CRDs.

The CRDs are not part of this repository. They are looked for in `$AUTOGLM_SCHEMAS`, then in `../shared/schemas` beside
the repository; without them these tests are skipped with a warning that says so.
"""

import functools
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import cel
import jsonschema
import pytest
import yaml

from services.mesh.policy import PolicyObject, load
from services.mesh.policy.base import Strict
from services.mesh.policy.destination_rule import DestinationRule
from services.mesh.policy.others import Gateway, InferencePool, ServiceEntry
from services.mesh.policy.telemetry import Telemetry
from services.mesh.policy.virtual_service import VirtualService

ROOT = Path(__file__).resolve().parents[2]
EVERYTHING = ROOT / "tests" / "unit" / "mesh_policy" / "everything"
SCHEMAS = Path(os.environ.get("AUTOGLM_SCHEMAS", ROOT.parent / "shared" / "schemas"))
MODELS: tuple[type[PolicyObject], ...] = (
    VirtualService,
    DestinationRule,
    ServiceEntry,
    InferencePool,
    Gateway,
    Telemetry,
)
NOT_YET_IN_1_30 = {"zoneAwareLbSetting", "outlierDetectionHttpErrorCodes"}
HIDDEN_FROM_SCHEMA = {"percent", "exponentialDelay", "http2Error"}
"""Fields that Istio's protobuf has, but whose CRD leaves them out or differs by version."""

MISSING = f"no CustomResourceDefinitions in {SCHEMAS}: manifests are NOT checked against Istio (set AUTOGLM_SCHEMAS)"


@pytest.fixture(autouse=True)
def _needs_schemas() -> None:
    if not _definitions():
        warnings.warn(MISSING, stacklevel=1)
        pytest.skip(MISSING)


@functools.cache
def _definitions() -> dict[tuple[str, str], dict[str, Any]]:
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for path in sorted(SCHEMAS.glob("*/*.yaml")):
        crd = yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506  # a safe loader
        for version in crd["spec"]["versions"]:
            key = (f"{crd['spec']['group']}/{version['name']}", crd["spec"]["names"]["kind"])
            found[key] = version["schema"]["openAPIV3Schema"]
    return found


def _strict_schema(node: Any) -> Any:
    """Kubernetes' dialect as JSON Schema, with unknown fields refused."""
    if isinstance(node, list):
        return [_strict_schema(item) for item in node]
    if not isinstance(node, dict):
        return node
    result = {key: _strict_schema(value) for key, value in node.items() if not key.startswith("x-kubernetes")}
    if node.get("x-kubernetes-int-or-string"):
        result["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if "properties" in node and "type" in node and not node.get("x-kubernetes-preserve-unknown-fields"):
        result.setdefault("additionalProperties", False)
    return result


def _with_defaults(schema: dict[str, Any], value: Any) -> Any:
    if isinstance(value, dict):
        filled = dict(value)
        for name, inner in schema.get("properties", {}).items():
            if name not in filled and "default" in inner:
                filled[name] = inner["default"]
            if name in filled:
                filled[name] = _with_defaults(inner, filled[name])
        return filled
    if isinstance(value, list):
        return [_with_defaults(schema.get("items", {}), item) for item in value]
    return value


def _is_url(text: str) -> bool:
    return re.match(r"[a-z]+://", text) is not None


def _rules(schema: dict[str, Any], value: Any, path: str) -> Iterator[str]:
    """Each CEL rule that does not hold. A rule that cannot be evaluated does not hold."""
    for rule in schema.get("x-kubernetes-validations", ()):
        if "oldSelf" in rule["rule"]:  # about a change, and these are first versions
            continue
        context = cel.Context(variables={"self": value})
        context.add_function("isURL", _is_url)
        try:
            holds = cel.evaluate(rule["rule"], context)
        except (ValueError, TypeError, RuntimeError) as error:
            holds = f"cannot be evaluated: {error}"
        if holds is not True:
            yield f"{path}: {rule.get('message', rule['rule'])} ({holds})"
    if isinstance(value, dict):
        for name, item in value.items():
            inner = schema.get("properties", {}).get(name) or schema.get("additionalProperties")
            if isinstance(inner, dict):
                yield from _rules(inner, item, f"{path}.{name}")
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from _rules(schema.get("items", {}), item, f"{path}[{number}]")


def mistakes(document: dict[str, Any]) -> list[str]:
    """What an API server with these CRDs would refuse in a document."""
    schema = _definitions()[(document["apiVersion"], document["kind"])]
    body = {key: value for key, value in document.items() if key not in {"apiVersion", "kind", "metadata"}}
    trimmed = {**schema, "properties": {k: v for k, v in schema["properties"].items() if k in {"spec", "status"}}}
    filled = _with_defaults(trimmed, body)
    validator = jsonschema.Draft202012Validator(_strict_schema(trimmed))
    found = [f"{error.json_path}: {error.message}" for error in validator.iter_errors(filled)]
    return found + list(_rules(trimmed, filled, "$"))


def documents() -> list[tuple[str, dict[str, Any]]]:
    """Every manifest under istio/, and the sample that uses each supported field."""
    paths = [*sorted((ROOT / "istio").rglob("*.yaml")), EVERYTHING / "policy.yaml"]
    return [
        (f"{path.relative_to(ROOT)}#{document['kind']}/{document['metadata']['name']}", document)
        for path in paths
        for document in yaml.safe_load_all(path.read_text())
        if document is not None and "metadata" in document
    ]


DOCUMENTS = documents()


@pytest.mark.parametrize("document", [item for _, item in DOCUMENTS], ids=[name for name, _ in DOCUMENTS])
def test_every_manifest_would_be_admitted_by_a_cluster(document: dict[str, Any]) -> None:
    """Schema and CEL rules of the CRDs hold for every manifest."""
    assert mistakes(document) == []


@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        ("DestinationRule", {"host": "a", "trafficPolicy": {"outlierDetection": {"consecutiveErors": 1}}}),
        ("DestinationRule", {"host": "a", "trafficPolicy": {"connectionPool": {"tcp": {"connectTimeout": "1us"}}}}),
        ("VirtualService", {"hosts": ["a"], "http": [{"timeout": "soon"}]}),
        ("ServiceEntry", {"hosts": []}),
    ],
)
def test_the_check_itself_sees_mistakes(kind: str, spec: dict[str, Any]) -> None:
    """A misspelt field, a rule of CEL and a bound are each found: the test above can fail."""
    assert mistakes({"apiVersion": "networking.istio.io/v1", "kind": kind, "metadata": {"name": "x"}, "spec": spec})


def _fields(model: type[Strict], schema: dict[str, Any], path: str) -> Iterator[str]:
    """Fields of a model, and fields it says Istio has, that the CRD does not know."""
    known = schema.get("properties", {})
    unknown = model.istio_has - known.keys() - NOT_YET_IN_1_30 - HIDDEN_FROM_SCHEMA
    yield from (f"{path}.{name} (istio_has)" for name in sorted(unknown))
    for name, field in model.model_fields.items():
        alias = field.alias or name
        if alias not in known:
            yield f"{path}.{alias}"
            continue
        inner = known[alias]
        nested = _nested(field.annotation)
        if nested is not None:
            inner = inner.get("items", inner)
            extra = inner.get("additionalProperties")
            yield from _fields(nested, extra if isinstance(extra, dict) else inner, f"{path}.{alias}")


def _nested(annotation: Any) -> type[Strict] | None:
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        return annotation
    return next((found for argument in get_args(annotation) if (found := _nested(argument)) is not None), None)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_our_models_know_no_field_that_istio_does_not(model: type[PolicyObject]) -> None:
    """Names are Istio's, in place and spelling, and the refusal's "Istio has it" is true."""
    api_version = get_args(model.model_fields["api_version"].annotation)[0]
    schema = _definitions()[(api_version, model.__name__)]["properties"]["spec"]
    spec = _nested(model.model_fields["spec"].annotation)
    assert spec is not None
    assert list(_fields(spec, schema, "spec")) == []


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_every_field_istio_has_is_either_supported_or_refused_by_name(model: type[PolicyObject]) -> None:
    """No field of the CRD falls through as merely "unknown" on a model of ours."""

    def gaps(part: type[Strict], schema: dict[str, Any], path: str) -> Iterator[str]:
        aliases = {field.alias or name: field for name, field in part.model_fields.items()}
        for name, inner in schema.get("properties", {}).items():
            if name not in aliases and name not in part.istio_has:
                yield f"{path}.{name}"
            nested = _nested(aliases[name].annotation) if name in aliases else None
            if nested is not None:
                inner = inner.get("items", inner)
                extra = inner.get("additionalProperties")
                yield from gaps(nested, extra if isinstance(extra, dict) else inner, f"{path}.{name}")

    api_version = get_args(model.model_fields["api_version"].annotation)[0]
    schema = _definitions()[(api_version, model.__name__)]["properties"]["spec"]
    spec = _nested(model.model_fields["spec"].annotation)
    assert spec is not None
    assert list(gaps(spec, schema, "spec")) == []


def test_the_base_manifests_say_what_they_mean_to_the_local_control_plane_too() -> None:
    """One set of files, two readers: what a cluster admits here, the local control plane loads."""
    kinds = {item.kind for item in load(ROOT / "istio" / "base")}
    assert kinds == {"VirtualService", "DestinationRule", "InferencePool", "Gateway", "Telemetry"}
