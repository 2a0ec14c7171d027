"""istio/base/authorization.yaml against what the code calls: nothing missing, nothing superfluous.

What is called is read from the sources: every `self._stub.Method(` of every clients.py, the stub's service from its
import; the endpoint picker from the InferencePool; and what clients may ask of the gateway from its descriptors.
"""

import ast
from pathlib import Path

import pytest
import yaml
from autoglm.gateway.v1 import gateway_pb2
from autoglm.third_party import ext_proc_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from services.mesh import access_table
from services.mesh.policy import Policy, load
from services.mesh.policy.objects import qualified
from services.mesh.registry import CLUSTER_DOMAIN, spiffe_id

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "istio" / "base"
NAMESPACE = access_table.NAMESPACE
Arrow = tuple[str, str, str]
"""Caller, callee, path."""


def stubs(tree: ast.Module) -> dict[str, str]:
    """The full gRPC service of each stub class that the module imports, by the words it is called with."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("autoglm."):
            for name in node.names:
                if name.name.endswith("_pb2_grpc"):
                    found[name.asname or name.name] = node.module
    return found


def called(path: Path) -> set[tuple[str, str]]:
    """(callee, path) of every call that a clients.py makes."""
    tree = ast.parse(path.read_text())
    modules = stubs(tree)
    found: set[tuple[str, str]] = set()
    for holder in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        service = ""
        for node in ast.walk(holder):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.endswith("Stub"):
                module = ast.unparse(node.func.value)
                service = f"{modules[module]}.{node.func.attr.removesuffix('Stub')}"
        for node in ast.walk(holder):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self._stub":
                assert service, f"{path}: {holder.name} calls {node.attr} of a stub that it does not make itself"
                found.add((service.split(".")[1].replace("_", "-"), f"/{service}/{node.attr}"))
    return found


def arrows_of_the_code() -> set[Arrow]:
    """Every call between members of the mesh."""
    found: set[Arrow] = set()
    for path in sorted((ROOT / "services").glob("*/clients.py")):
        caller = path.parent.name.replace("_", "-")
        found |= {(caller, callee, method) for callee, method in called(path)}
    for pool in load(BASE).inference_pools:
        picker = pool.spec.endpoint_picker_ref.name
        picked = pool.spec.selector.match_labels["app"]
        process = ext_proc_pb2.DESCRIPTOR.services_by_name["ExternalProcessor"]
        found |= {
            (caller, picker, f"/{process.full_name}/Process") for caller, callee, _ in set(found) if callee == picked
        }
    files = (gateway_pb2.DESCRIPTOR, health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR)
    for service in (item for file in files for item in file.services_by_name.values()):
        found |= {("ingress", "gateway", f"/{service.full_name}/{method.name}") for method in service.methods}
    found.add(("ingress", "gateway", access_table.REFLECTION_V1))
    return found


def arrows_of_the_manifests() -> set[Arrow]:
    """Every gRPC call that the manifests allow, as they are written."""
    found: set[Arrow] = set()
    for item in load(BASE).authorization_policies:
        callee = item.spec.selector.match_labels.get("app")
        for rule in item.spec.rules if callee is not None else ():
            for source in (part.source for part in rule.from_):
                for principal in source.principals:
                    caller = principal.rpartition("/")[2]
                    assert f"spiffe://{principal}" == spiffe_id(NAMESPACE, caller)
                    paths = (path for part in rule.to for path in part.operation.paths if "." in path)
                    found |= {(caller, callee or "", path) for path in paths}
    return found


def test_allowed_is_exactly_what_is_called() -> None:
    """Each call of the code is allowed, and each allowed call is made: both sets, method by method, are equal."""
    code, manifests = arrows_of_the_code(), arrows_of_the_manifests()
    assert sorted(code - manifests) == [], "called, but not allowed in istio/base/authorization.yaml"
    assert sorted(manifests - code) == [], "allowed in istio/base/authorization.yaml, but called by nobody"
    assert ("gateway", "sparse-inference", "/autoglm.sparse_inference.v1.SparseInferenceService/Generate") in code


def test_the_collector_would_miss_no_caller() -> None:
    """Stubs are made in clients.py only: reading those files is reading all calls between services.

    (A process that probes its own health does not call through the mesh.)
    """
    elsewhere = []
    for path in sorted((ROOT / "services").rglob("*.py")):
        if path.name in ("clients.py", "probe.py") or {"mesh", "trainer"} & set(path.relative_to(ROOT).parts):
            continue
        tree = ast.parse(path.read_text())
        elsewhere += [
            f"{path}:{node.lineno}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.endswith("Stub")
        ]
    assert not elsewhere


def test_rest_paths_are_those_of_the_gateway() -> None:
    """What the gateway's application serves to clients is allowed to the ingress; its probes and figures are not."""
    tree = ast.parse((ROOT / "services" / "gateway" / "rest" / "app.py").read_text())
    served = {
        ast.literal_eval(node.args[0]): next(
            (set(ast.literal_eval(word.value)) for word in node.keywords if word.arg == "methods"), {"GET"}
        )
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Route"
    }
    policy = load(BASE)
    ingress = spiffe_id(NAMESPACE, "ingress")
    for pattern, verbs in served.items():
        path = pattern.replace("{name:path}", "some/model")
        for verb in ("GET", "POST"):
            call = access_table.Call(verb, path)
            allowed = access_table.is_allowed(policy, access_table.workload("gateway"), ingress, call)
            assert allowed == (verb in verbs and pattern not in ("/live", "/metrics")), (verb, path)
    assert len(served) >= 7


def test_topology_and_policy_name_the_same_arrows() -> None:
    """Who has an outbound listener for a service is who may call it: deploy/local/mesh.yaml says the same."""
    services = yaml.safe_load((ROOT / "deploy" / "local" / "mesh.yaml").read_text())["services"]
    local = {(caller, callee) for caller, spec in services.items() for callee in spec.get("calls", ())}
    assert local == {(caller, callee) for caller, callee, _ in arrows_of_the_manifests() if caller != "ingress"}


def test_what_the_door_leads_to_is_allowed_behind_it() -> None:
    """Every service that VirtualService/ingress routes to allows the ingress something."""
    policy = load(BASE)
    hosts = {
        qualified(target.destination.host, service.metadata.namespace)
        for service in policy.virtual_services
        if "ingress" in service.spec.gateways
        for route in service.spec.http
        for target in route.route
    }
    callees = {callee for caller, callee, _ in arrows_of_the_manifests() if caller == "ingress"}
    assert hosts == {f"{callee}.{NAMESPACE}.{CLUSTER_DOMAIN}" for callee in callees}


def test_the_table_in_the_documentation_is_current() -> None:
    """docs/access.md is what the manifests give now; `python -m services.mesh access > docs/access.md` renews it."""
    assert (ROOT / "docs" / "access.md").read_text() == access_table.render(load(BASE))


@pytest.mark.parametrize("name", ["peer-authentication.yaml", "authorization.yaml"])
def test_a_cluster_gets_the_policies_too(name: str) -> None:
    """Where the base has a kustomization, it lists the access policies: left out, everything would be allowed."""
    path = BASE / "kustomization.yaml"
    if not path.exists():
        pytest.skip("istio/base has no kustomization: every file of it is applied")
    assert name in yaml.safe_load(path.read_text())["resources"]


def test_an_idle_policy_would_be_seen() -> None:
    """The table refuses to judge rules that look at more than it knows, instead of guessing."""
    item = next(item for item in load(BASE).authorization_policies if item.metadata.name == "cache")
    rule = item.spec.rules[0]
    source = rule.from_[0].source.model_copy(update={"request_principals": ("*",)})
    harder = rule.model_copy(update={"from_": (rule.from_[0].model_copy(update={"source": source}),)})
    changed = item.model_copy(update={"spec": item.spec.model_copy(update={"rules": (harder,)})})
    call = access_table.calls("cache")[0]
    with pytest.raises(access_table.Undecided, match="request_principals"):
        access_table.is_allowed(
            Policy(authorization_policies=(changed,)), access_table.workload("cache"), spiffe_id(NAMESPACE, "x"), call
        )
