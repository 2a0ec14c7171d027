"""Checks across objects: what is named must exist, and what is written must be able to happen."""

from pathlib import Path

import pytest

from services.mesh.policy import Problem, check, load
from services.mesh.registry import Endpoint, Registry, Service, ServicePort

ROOT = Path(__file__).resolve().parents[3]
EVERYTHING = Path(__file__).with_name("everything") / "policy.yaml"
GRPC = ServicePort("grpc", 50051, "grpc")


def registry(workers: int = 1, canaries: int = 1) -> Registry:
    """The base services, with a number of v1 workers and of canaries."""
    versions = ["v1"] * workers + ["canary"] * canaries
    here = tuple(Endpoint("127.0.0.1", 7000 + n, {"version": version}) for n, version in enumerate(versions))
    return Registry(
        (
            Service("gateway", "autoglm", (GRPC, ServicePort("http", 8000, "http"))),
            *(Service(name, "autoglm", (GRPC,)) for name in ("tokenizer", "scheduler", "cache")),
            Service("sparse-inference", "autoglm", (GRPC,), {"grpc": here}, {"app": "sparse-inference"}),
        )
    )


def findings(tmp_path: Path, old: str = "", new: str = "", workers: int = 1, canaries: int = 1) -> tuple[Problem, ...]:
    """The findings on everything/policy.yaml with one text replaced."""
    text = EVERYTHING.read_text()
    assert old in text
    (tmp_path / "p.yaml").write_text(text.replace(old, new, 1) if old else text)
    return check(load(tmp_path), registry(workers, canaries))


def test_the_base_policy_has_neither_errors_nor_warnings() -> None:
    """istio/base fits the services it is written for."""
    assert check(load(ROOT / "istio" / "base"), registry()) == ()


def test_everything_supported_fits_together(tmp_path: Path) -> None:
    """The sample with every field has no findings: so each finding below comes from the one change."""
    assert findings(tmp_path) == ()


@pytest.mark.parametrize(
    ("old", "new", "path", "message"),
    [
        (
            "hosts: [sparse-inference]",
            "hosts: [nobody]",
            "spec.hosts[0]",
            "unknown host nobody.autoglm.svc.cluster.local",
        ),
        (
            "mirror: {host: sparse-inference, subset",
            "mirror: {host: nobody, subset",
            "spec.http[0].mirror.host",
            "unknown host",
        ),
        (
            "host: sparse-inference, subset: v1",
            "host: sparse-inference, subset: v9",
            "spec.http[0].route[0].destination.subset",
            "DestinationRule/workers defines no subset 'v9'",
        ),
        (
            "{host: gateway, port: {number: 8000}}",
            "{host: scheduler, subset: v1}",
            "spec.http[0].route[0].destination.subset",
            "has no DestinationRule",
        ),
        (
            "{host: gateway, port: {number: 8000}}",
            "{host: gateway}",
            "spec.http[0].route[0].destination.port",
            "several ports",
        ),
        (
            "{host: gateway, port: {number: 8000}}",
            "{host: gateway, port: {number: 1}}",
            "spec.http[0].route[0].destination.port.number",
            "has no port 1",
        ),
        ("weight: 75", "weight: 70", "spec.http[0].route", "weights add up to 95, not 100"),
        (
            "retryOn: unavailable,503",
            "retryOn: unavaliable",
            "spec.http[0].retries.retryOn",
            "unknown condition 'unavaliable'",
        ),
        ("retryOn: unavailable,503", "retryOn: '99'", "spec.http[0].retries.retryOn", "unknown condition '99'"),
        (
            "grpcStatus: UNAVAILABLE",
            "grpcStatus: GONE",
            "spec.http[0].fault.abort.grpcStatus",
            "unknown gRPC status 'GONE'",
        ),
        (
            "gateways: [ingress]\n  exportTo",
            "gateways: [egress, ingress]\n  exportTo",
            "spec.gateways",
            "unknown gateway autoglm/egress",
        ),
        (
            "uri: {prefix: /v1/}, port",
            "uri: {regex: /v1/.*}, port",
            "spec.http[0].rewrite.uri",
            "cannot rewrite a path matched by regex",
        ),
        ("host: cache", "host: tokenizer", "spec.host", "already has DestinationRule/cache"),
        ("host: cache", "host: nobody", "spec.host", "unknown host"),
        ("- name: canary\n", "- name: v1\n", "spec.subsets", "subset 'v1' is defined twice"),
        (
            "- port: {number: 50051}\n",
            "- port: {number: 1}\n",
            "spec.subsets[1].trafficPolicy.portLevelSettings[0].port.number",
            "has no port 1",
        ),
        ("name: scheduler, port", "name: nobody, port", "spec.endpointPickerRef.name", "unknown service"),
        (
            "name: scheduler, port: {number: 50051}",
            "name: scheduler, port: {number: 1}",
            "spec.endpointPickerRef.port.number",
            "has no port 1",
        ),
        (
            "hosts: [models.other.example]",
            "hosts: [cache.autoglm.svc.cluster.local]",
            "spec.hosts[0]",
            "already a service of the registry",
        ),
        ("address: 10.0.0.2", "address: a.example", "spec.endpoints[1].address", "is not an IP address"),
        ("hosts: [models.other.example]", "hosts: [models.clouds.example]", "spec.hosts[0]", "ServiceEntry/clouds"),
        ("hosts: [sparse-inference]", "hosts: [cache, cache]", "spec.hosts[1]", "is listed twice"),
        (
            "  hosts: [sparse-inference]\n",
            "  hosts: [sparse-inference, sparse-inference.autoglm.svc.cluster.local, '*']\n",
            "spec.hosts[2]",
            "unknown host *",
        ),
    ],
)
def test_a_mistake_between_objects_is_found_at_its_place(
    tmp_path: Path, old: str, new: str, path: str, message: str
) -> None:
    """Each is an error that names the path and the thing that is missing."""
    found = [problem for problem in findings(tmp_path, old, new) if problem.path == path]
    assert found
    assert found[0].severity == "error"
    assert message in found[0].message


def test_two_virtual_services_for_one_host_are_refused(tmp_path: Path) -> None:
    """Istio would take one of them, and which one is undefined."""
    text = EVERYTHING.read_text()
    extra = text.split("---\n")[3].replace("name: workers", "name: zzz")
    (tmp_path / "p.yaml").write_text(text + "---\n" + extra)
    assert [problem.path for problem in check(load(tmp_path), registry())] == ["spec.hosts[0]"]


@pytest.mark.parametrize(
    ("percent", "workers", "is_warned"),
    [
        ("10", 9, True),
        ("10", 10, False),
        ("100", 1, False),
        ("50", 1, True),
        ("50", 2, False),
        ("0", 64, True),
    ],
)
def test_ejection_that_can_never_happen_is_a_warning(
    tmp_path: Path, percent: str, workers: int, is_warned: bool
) -> None:
    """Envoy ejects only whole endpoints: a tenth of nine is none. The policy still works, so it is not refused."""
    all_found = findings(tmp_path, "maxEjectionPercent: 100", f"maxEjectionPercent: {percent}", workers, 0)
    found = [problem for problem in all_found if "outlierDetection" in problem.path]
    assert [problem.severity for problem in found] == (["warning"] if is_warned else [])


def test_a_missing_ejection_percentage_means_envoys_ten(tmp_path: Path) -> None:
    """The default is the trap, so it is warned about as well."""
    found = findings(tmp_path, "      maxEjectionPercent: 100\n")
    assert "10 % of the 2 endpoint(s)" in found[0].message


@pytest.mark.parametrize(
    ("workers", "canaries", "words"),
    [(1, 0, "25 % of the requests go to subset canary"), (0, 1, "75 % of the requests go to subset v1")],
)
def test_weight_for_a_subset_in_which_nobody_runs_is_a_warning(
    tmp_path: Path, workers: int, canaries: int, words: str
) -> None:
    """That share of the requests fails; the message says which share, which labels, and both ways out."""
    found = findings(tmp_path, workers=workers, canaries=canaries)
    assert {problem.severity for problem in found} == {"warning"}
    assert any(words in str(problem) and "start a replica" in str(problem) for problem in found)


def test_nobody_is_warned_while_a_service_starts(tmp_path: Path) -> None:
    """Without any endpoint the service is starting or gone, and that is said elsewhere; weight 0 asks for nothing."""
    assert findings(tmp_path, workers=0, canaries=0) == ()
    assert check(load(ROOT / "istio" / "base"), registry(1, 0)) == ()


def test_a_door_that_leads_nowhere_is_a_warning(tmp_path: Path) -> None:
    """Deleting the routes is allowed and answers 404 to everybody: worth a word."""
    (tmp_path / "p.yaml").write_text((ROOT / "istio" / "base" / "gateway.yaml").read_text())
    (found,) = check(load(tmp_path), registry())
    assert found.severity == "warning" and "answered 404" in found.message
