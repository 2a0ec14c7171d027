"""The loader: strict, bounded, and tells everything at once."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from services.mesh.policy import Limits, Policy, PolicyError, load
from services.mesh.policy.base import Strict
from services.mesh.policy.loading import KINDS

EVERYTHING = Path(__file__).with_name("everything") / "policy.yaml"
BASE = Path(__file__).resolve().parents[3] / "istio" / "base"
MODELS = tuple(KINDS.values())


def problems(directory: Path, limits: Limits | None = None) -> list[str]:
    """What the loader has to say, one line per mistake."""
    with pytest.raises(PolicyError) as caught:
        load(directory, limits or Limits())
    return [str(problem).replace(f"{directory}/", "") for problem in caught.value.problems]


def read(directory: Path, text: str) -> Policy:
    """Loads one file."""
    (directory / "p.yaml").write_text(text)
    return load(directory)


def test_the_base_policy_loads() -> None:
    """istio/base uses only what the local control plane supports."""
    policy = load(BASE)
    assert {service.metadata.name for service in policy.virtual_services} == {
        "ingress",
        "tokenizer",
        "scheduler",
        "cache",
        "sparse-inference",
    }
    assert policy.inference_pools[0].spec.endpoint_picker_ref.failure_mode == "FailOpen"


def _refused() -> Iterator[tuple[str, str, str]]:
    """(kind, path of a field that Istio has and we lack, the field), by walking models and document together."""
    documents = list(yaml.safe_load_all(EVERYTHING.read_text()))

    def walk(model: type[Strict], value: Any, path: str) -> Iterator[tuple[str, str]]:
        yield from ((path, name) for name in sorted(model.istio_has))
        for name, field in model.model_fields.items():
            inner = value.get(field.alias or name) if isinstance(value, dict) else None
            for nested in _strict(field.annotation):
                if isinstance(inner, list):
                    for number, item in enumerate(inner):
                        yield from walk(nested, item, f"{path}.{field.alias or name}[{number}]")
                elif isinstance(inner, dict) and not _is_mapping(field.annotation):
                    yield from walk(nested, inner, f"{path}.{field.alias or name}")

    for document in documents:
        model = next(model for model in MODELS if model.__name__ == document["kind"])
        for path, name in walk(model, document, ""):
            yield f"{document['kind']}/{document['metadata']['name']}", path.lstrip("."), name


def _strict(annotation: Any) -> list[type[Strict]]:
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        return [annotation]
    return [found for argument in get_args(annotation) for found in _strict(argument)]


def _is_mapping(annotation: Any) -> bool:
    return getattr(annotation, "__origin__", None) is dict


REFUSED = sorted(set(_refused()))


def test_every_field_we_lack_is_listed_for_refusal() -> None:
    """The walk below really covers the models: each `istio_has` of each reachable model is met."""

    def owners(model: type[Strict]) -> set[tuple[type[Strict], str]]:
        found = {(model, name) for name in model.istio_has}
        for field in model.model_fields.values():
            for nested in _strict(field.annotation):
                found |= owners(nested)
        return found

    expected = {name for model in MODELS for _, name in owners(model)}
    assert {name for _, _, name in REFUSED} == expected


@pytest.mark.parametrize(("label", "path", "name"), REFUSED, ids=lambda value: value)
def test_a_field_istio_has_and_we_lack_is_refused_by_its_path(tmp_path: Path, label: str, path: str, name: str) -> None:
    """Nothing is ignored in silence: the refusal names file, object and path, and says that Istio would know it."""
    documents = list(yaml.safe_load_all(EVERYTHING.read_text()))
    document = next(item for item in documents if f"{item['kind']}/{item['metadata']['name']}" == label)
    target = document
    for part in filter(None, path.replace("[", ".").replace("]", "").split(".")):
        target = target[int(part)] if part.isdigit() else target[part]
    target[name] = {}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump_all(documents))
    full = f"{path}.{name}" if path else name
    assert problems(tmp_path) == [
        f"p.yaml: {label}: {full}: not supported by the local control plane (Istio 1.30.3 has it)"
    ]


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    """An operator fixes a policy in one round: every file, every object, every field."""
    (tmp_path / "a.yaml").write_text("""
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: gateway, namespace: autoglm}
spec:
  hosts: [gateway]
  http:
    - delegate: {}
      timeout: fast
      rout: []
      route: [{destination: {host: gateway}, weight: "90"}]
---
kind: Sidecar
metadata: {name: deny}
---
kind: Deployment
metadata: {name: worker}
""")
    (tmp_path / "b.yaml").write_text("""
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: gateway, namespace: autoglm}
spec:
  host: gateway
  trafficPolicy: {outlierDetection: {consecutive5xxError: 3, maxEjectionPercent: 101}}
""")
    found = problems(tmp_path)
    unsupported = "not supported by the local control plane (Istio 1.30.3 has it)"
    for line in (
        "a.yaml: VirtualService/gateway: spec.http[0].timeout: "
        "must be a duration such as 10s, 1.5s, 250ms or 1h (got 'fast')",
        f"a.yaml: VirtualService/gateway: spec.http[0].delegate: {unsupported}",
        "a.yaml: VirtualService/gateway: spec.http[0].rout: unknown field; did you mean route?",
        "a.yaml: VirtualService/gateway: spec.http[0].route[0].weight: input should be a valid integer (got '90')",
        f"a.yaml: Sidecar/deny: kind: {unsupported}",
        "b.yaml: DestinationRule/gateway: spec.trafficPolicy.outlierDetection.consecutive5xxError: "
        "unknown field; did you mean consecutive5xxErrors?",
    ):
        assert line in found
    assert any(
        "b.yaml" in line and "maxEjectionPercent: input should be less than or equal to 100" in line for line in found
    )
    assert any(line.startswith("a.yaml: Deployment/worker: kind: unknown kind 'Deployment'") for line in found)
    assert len(found) == 8


HEAD = "apiVersion: telemetry.istio.io/v1\nkind: Telemetry\nmetadata: {name: t, namespace: autoglm}\n"
GOOD = HEAD + "spec: {tracing: [{randomSamplingPercentage: 5}]}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &x [1]\nb: *x\n", "aliases are not allowed"),
        (GOOD + "kind: Telemetry\n", "key 'kind' is repeated"),
        ("[" * 40 + "]" * 40, "nested deeper than 32"),
        ("- " * 9000, "nested deeper than 32"),
        ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("a: [", "while parsing"),
        ("\x00", "special characters are not allowed"),
        ("yes: 1\n", "keys must be text"),
        ("just text", "not a Kubernetes object"),
        ("", "holds no object"),
        ("# all of it commented out\n---\n", "holds no object"),
        ("kind: [1]\nmetadata: {name: {a: 1}}\n", "unknown kind [1]"),
        ("kind: " + "x" * 1000, "unknown kind 'xxx"),
        (GOOD.replace(": 5", ": .nan"), "not expressible as JSON"),
        (GOOD.replace("name: t", "name: 2020-01-01"), "not expressible as JSON"),
        (GOOD + "---\n" + GOOD, "already defined in"),
        (GOOD.replace("5}]", "101}]"), "less than or equal to 100"),
        (GOOD.replace("telemetry.istio.io/v1", "telemetry.istio.io/v1alpha1"), "apiVersion"),
        ("# " + "x" * 300_000, "larger than 262144 bytes"),
        ("[" + "a," * 60_000 + "]", "more than 50000 YAML nodes"),
    ],
)
def test_yaml_that_could_hurt_or_mislead_is_refused(tmp_path: Path, text: str, message: str) -> None:
    """Bounded depth, size and nodes; no aliases, tags, repeated keys, or values that JSON does not have."""
    (tmp_path / "p.yaml").write_text(text)
    found = problems(tmp_path)
    assert len(found) == 1
    assert message in found[0] and len(found[0]) < 500


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    """A binary file with a YAML name is one more problem, not a crash."""
    (tmp_path / "p.yaml").write_bytes(b"\xff\xfe\x00")
    assert "codec can't decode" in problems(tmp_path)[0]


def test_files_and_objects_are_bounded(tmp_path: Path) -> None:
    """A folder full of files is refused before it is read; objects are counted over all files."""
    for number in range(3):
        (tmp_path / f"{number}.yaml").write_text(GOOD.replace("name: t", f"name: t{number}"))
    assert len(load(tmp_path).telemetries) == 3
    assert "at most 2 are read" in problems(tmp_path, Limits(files=2))[0]
    assert "more than 2 objects" in problems(tmp_path, Limits(objects=2))[0]
    assert "not a folder" in problems(tmp_path / "nowhere")[0]


def test_durations_are_read_as_istio_writes_them(tmp_path: Path) -> None:
    """Go's forms of a duration, and nothing else."""
    text = EVERYTHING.read_text()
    for written, seconds in (("1h", 3600), ("1m30s", 90), ("250ms", 0.25), ("1.5s", 1.5), ("0s", 0)):
        policy = read(tmp_path, text.replace("timeout: 1.5s", f"timeout: {written}"))
        timeout = policy.virtual_services[1].spec.http[0].timeout
        assert timeout is not None
        assert timeout.total_seconds() == seconds
    for written in ("-1s", "1", "s", "1d", "1e3s", "' 1s'", "200h"):
        (tmp_path / "p.yaml").write_text(text.replace("timeout: 1.5s", f"timeout: {written}"))
        assert len(problems(tmp_path)) == 1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("retries: {attempts: 0}", "retries: {attempts: 0, retryOn: reset}", "attempts: 0 switches retries off"),
        ("percentage: {value: 100}, ", "", "required"),
        ("{simple: ROUND_ROBIN, ", "{simple: RANDOM, ", "warmup works only with"),
        ("{useSourceIp: true}", "{useSourceIp: true, httpHeaderName: x}", "give exactly one of"),
        ("uri: {exact: /a/B}", "uri: {exact: /a, prefix: /b}", "give only one of exact, prefix, regex"),
        (
            "grpcStatus: UNAVAILABLE",
            "grpcStatus: UNAVAILABLE, httpStatus: 500",
            "give exactly one of httpStatus, grpcStatus",
        ),
        ("x-to: v1}", '"x to": v1}', "is not a header name"),
        ("labels: {version: v1}, locality", "labels: {version: 'v 1'}, locality", "is not a Kubernetes label"),
        ("x-from: v1}", '"x-from": "a\\r\\nb"}', "should match pattern"),
        ("resolution: DNS\n", "resolution: STATIC\n", "resolution STATIC needs endpoints"),
        ("      mirror: {host: sparse-inference, subset: canary}\n", "", "mirrorPercentage needs mirror"),
    ],
)
def test_values_that_contradict_each_other_are_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    """What Istio's own validation refuses is refused here, too."""
    text = EVERYTHING.read_text()
    assert old in text
    (tmp_path / "p.yaml").write_text(text.replace(old, new, 1))
    found = problems(tmp_path)
    assert len(found) == 1
    assert message in found[0]
