"""Every manifest under istio/, by all sieves: our models, a cluster's definitions, and checks across objects.

The CustomResourceDefinitions are not part of this repository. They are looked for in `$AUTOGLM_SCHEMAS`, then in
`shared/schemas` beside the repository; without them the tests that need them are skipped with a warning that says so.
"""

import functools
import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from services.mesh import checking, topology
from services.mesh.policy import Problem, crds, load
from services.mesh.policy.base import Strict
from services.mesh.policy.gateway_api import GATEWAY_KINDS
from services.mesh.policy.loading import KINDS
from services.mesh.registry import Registry

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "istio" / "base"
EVERYTHING = ROOT / "tests" / "unit" / "mesh_policy" / "everything"
MODELS = tuple(KINDS.values())
NOT_YET_IN_1_30 = {"zoneAwareLbSetting", "outlierDetectionHttpErrorCodes"}
HIDDEN_FROM_SCHEMA = {"percent", "exponentialDelay", "http2Error"}
"""Fields that Istio's protobuf has, but whose CRD leaves them out or differs by version."""
FAULTY = yaml.safe_load(Path(__file__).with_name("faulty_manifests.yaml").read_text())
FOLDERS = checking.folders(ROOT / "istio")


@functools.cache
def definitions() -> crds.Definitions:
    """The CustomResourceDefinitions, or nothing."""
    return crds.read(crds.folder(ROOT))


def need_definitions() -> crds.Definitions:
    """The same; skips the test, with a warning, where there are none."""
    found = definitions()
    if not found:
        missing = f"no CustomResourceDefinitions in {crds.folder(ROOT)}: manifests are NOT checked against Istio's own"
        warnings.warn(f"{missing} (set AUTOGLM_SCHEMAS)", stacklevel=2)
        pytest.skip(missing)
    return found


@functools.cache
def registry() -> Registry:
    """What deploy/local/mesh.yaml would start."""
    processes = topology.load(ROOT / "deploy" / "local" / "mesh.yaml")
    planned = topology.instances(processes, itertools.count(7000))
    return topology.registry(processes, "autoglm", "127.0.0.1", planned)


def problems(folder: Path, known: crds.Definitions) -> list[Problem]:
    """Everything the check has to say about a folder."""
    return list(checking.check(folder, BASE, registry(), known).problems)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_folder_is_right_by_our_own_sieves(folder: Path) -> None:
    """Strict models and cross-object checks: neither an error nor a warning."""
    assert [str(problem) for problem in problems(folder, {})] == []


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_folder_would_be_admitted_by_a_cluster(folder: Path) -> None:
    """Schema and CEL rules of the definitions hold for everything that the folder builds."""
    verdict = checking.check(folder, BASE, registry(), need_definitions())
    assert [str(problem) for problem in verdict.problems] == []
    assert verdict.objects > 0


def test_no_manifest_is_outside_of_the_folders_that_are_checked() -> None:
    """A file without a kustomization beside it would never be applied, and never be checked."""
    for path in sorted((ROOT / "istio").rglob("*.yaml")):
        assert path.parent in FOLDERS, path


def test_the_sample_with_every_field_is_admitted_too() -> None:
    """What our models call Istio is Istio."""
    for document in yaml.safe_load_all((EVERYTHING / "policy.yaml").read_text()):
        assert [str(item) for item in crds.mistakes(document, need_definitions())] == [], document["metadata"]


@pytest.mark.parametrize("case", FAULTY, ids=[case["name"] for case in FAULTY])
def test_each_mistake_is_caught_by_name(case: dict[str, Any], tmp_path: Path) -> None:
    """The check names the path and says what is wrong; warnings are for what a cluster would take."""
    known = need_definitions() if case.get("by") == "cluster" else {}
    (tmp_path / "base").symlink_to(BASE, target_is_directory=True)
    overlay: dict[str, Any] = {"resources": ["base"]}
    if "add" in case:
        (tmp_path / "more.yaml").write_text(yaml.safe_dump(case["add"]))
        overlay["resources"].append("more.yaml")
    else:
        change = case["operations"] if "operations" in case else case["patch"]
        overlay["patches"] = [{"target": case["target"], "patch": yaml.safe_dump(change)}]
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
    found = [item for item in problems(tmp_path, known) if case["path"] in item.path and case["words"] in item.message]
    assert found, [str(item) for item in problems(tmp_path, known)]
    assert {item.severity for item in found} == {case.get("severity", "error")}
    assert all(item.file and item.object for item in found)


GATEWAY_API = {
    "a backend that is not there": (
        "name: gateway\n          port: 50051",
        "name: door\n          port: 50051",
        "unknown service door",
    ),
    "a port that is not there": ("port: 8000", "port: 8001", "has no port 8001"),
    "a pool that is not there": (
        "name: sparse-inference-canary\n          weight",
        "name: spare\n          weight",
        "unknown InferencePool spare",
    ),
    "a parent that is not there": ("    - name: workers", "    - name: worker", "unknown Gateway worker"),
    "a listener that is not there": ("sectionName: grpc", "sectionName: http2", "has no listener 'http2'"),
    "no weight at all": ("weight: 100", "weight: 0", "all weights are 0"),
    "a misspelt field": ("backendRefs:", "backendRef:", "unknown field; did you mean backendRefs?"),
}


@pytest.mark.parametrize("case", GATEWAY_API.values(), ids=GATEWAY_API.keys())
def test_mistakes_in_the_gateway_apis_words_are_caught_too(case: tuple[str, str, str], tmp_path: Path) -> None:
    """The same promises for HTTPRoute, GRPCRoute and their Gateways."""
    old, new, words = case
    for path in (ROOT / "istio" / "gateway-api").glob("*.yaml"):
        text = path.read_text()
        (tmp_path / path.name).write_text(text.replace(old, new, 1) if path.name == "routes.yaml" else text)
    assert any(words in str(problem) for problem in problems(tmp_path, {}))


def test_pools_that_fight_over_a_worker_are_caught(tmp_path: Path) -> None:
    """A worker in two pools would be placed by two pickers' countings."""
    for path in (ROOT / "istio" / "gateway-api").glob("*.yaml"):
        (tmp_path / path.name).write_text(path.read_text().replace("      version: canary\n", ""))
    assert any("selects workers that InferencePool/sparse-inference-canary" in str(p) for p in problems(tmp_path, {}))


def test_the_local_control_plane_refuses_the_gateway_api_by_name() -> None:
    """It says which kinds it takes instead; nothing is served half."""
    with pytest.raises(Exception, match="does not serve the Gateway API; it takes Gateway and VirtualService"):
        load(ROOT / "istio" / "gateway-api")


def test_a_rule_that_cannot_be_evaluated_is_broken_not_kept() -> None:
    """An unknown function in a rule must never let a document through."""
    schema = {"properties": {"spec": {"type": "object", "x-kubernetes-validations": [{"rule": "nonsense(self)"}]}}}
    document = {"apiVersion": "a/v1", "kind": "B", "spec": {}}
    (found,) = crds.mistakes(document, {("a/v1", "B"): schema})
    assert "cannot validate" in found.message


def test_an_unknown_version_is_named_with_those_that_are_served() -> None:
    """A manifest of an older API version is refused, with the version to write."""
    document = {"apiVersion": "networking.istio.io/v2", "kind": "VirtualService", "spec": {}}
    (found,) = crds.mistakes(document, need_definitions())
    assert "VirtualService is served as networking.istio.io/v1" in found.message


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
        if inner.get("x-kubernetes-preserve-unknown-fields"):
            continue  # a piece of Envoy's own configuration, which no schema of Istio's describes
        if nested is not None:
            inner = inner.get("items", inner)
            extra = inner.get("additionalProperties")
            yield from _fields(nested, extra if isinstance(extra, dict) else inner, f"{path}.{alias}")


def _nested(annotation: Any) -> type[Strict] | None:
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        return annotation
    return next((found for argument in get_args(annotation) if (found := _nested(argument)) is not None), None)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_our_models_know_no_field_that_istio_does_not(model: type[Strict]) -> None:
    """Names are Istio's, in place and spelling, and the refusal's "Istio has it" is true."""
    api_version = get_args(model.model_fields["api_version"].annotation)[0]
    schema = need_definitions()[(api_version, model.__name__)]["properties"]["spec"]
    spec = _nested(model.model_fields["spec"].annotation)
    assert spec is not None
    assert list(_fields(spec, schema, "spec")) == []


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_every_field_istio_has_is_either_supported_or_refused_by_name(model: type[Strict]) -> None:
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
    schema = need_definitions()[(api_version, model.__name__)]["properties"]["spec"]
    spec = _nested(model.model_fields["spec"].annotation)
    assert spec is not None
    assert list(gaps(spec, schema, "spec")) == []


def test_the_base_manifests_say_what_they_mean_to_the_local_control_plane_too() -> None:
    """One set of files, two readers: what a cluster admits here, the local control plane loads."""
    kinds = {item.kind for item in load(ROOT / "istio" / "base")}
    assert kinds >= {"VirtualService", "DestinationRule", "InferencePool", "Gateway", "Telemetry"} | {
        "PeerAuthentication",
        "AuthorizationPolicy",
    }


def test_the_gateway_apis_models_know_no_field_that_it_does_not_have() -> None:
    """Names are the Gateway API's. What it has beyond them is refused as unknown: only the check reads these kinds."""
    for model in GATEWAY_KINDS.values():
        version, kind = (get_args(model.model_fields[name].annotation)[0] for name in ("api_version", "kind"))
        schema = need_definitions()[(version, kind)]["properties"]["spec"]
        spec = _nested(model.model_fields["spec"].annotation)
        assert spec is not None
        assert list(_fields(spec, schema, "spec")) == []
