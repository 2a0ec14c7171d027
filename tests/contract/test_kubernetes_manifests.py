"""What a cluster would be given: built by Kustomize, held to Kubernetes' own schemas, and to each other and the code.

No cluster is asked. The schemas are those of the newest Kubernetes that `kubernetes-validate` carries, strictly: an
unknown field fails. Istio's objects have their own tests beside this file.
"""

from __future__ import annotations

import ast
import copy
import functools
import hashlib
import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from benchmarks import sizing
from services.chassis.settings import ServiceSettings
from tests.fakes.image import instructions
from tests.fakes.kustomize import Object, build
from tests.fakes.processes import running

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
VERSION = "1.37"
OVERLAYS = ("aws", "gcp", "azure", "small")
FOLDERS = ("base", *(f"overlays/{name}" for name in OVERLAYS))
SERVICES = ("gateway", "tokenizer", "scheduler", "sparse-inference", "cache")
ISTIO = ("networking.istio.io/", "security.istio.io/", "telemetry.istio.io/", "inference.networking.k8s.io/")
ROUND_TRIP_S = 5
"""What a drain takes beyond its grace: a last report, threads that end, the process's own exit."""


def built(folder: str) -> list[Object]:
    return build(KUBERNETES / folder)


def kubernetes_objects(folder: str) -> list[Object]:
    return [item for item in built(folder) if not item["apiVersion"].startswith(ISTIO)]


def of(objects: list[Object], kind: str) -> dict[str, Object]:
    return {item["metadata"]["name"]: item for item in objects if item["kind"] == kind}


def pod(deployment: Object) -> Object:
    spec: Object = deployment["spec"]["template"]["spec"]
    return spec


def program(deployment: Object) -> Object:
    """The one container of the pod."""
    (container,) = pod(deployment)["containers"]
    found: Object = container
    return found


def service_of(deployment: Object) -> str:
    return str(deployment["spec"]["template"]["metadata"]["labels"]["app"])


def ours(objects: list[Object]) -> dict[str, Object]:
    """Deployments of our own programs; the gateways are Istio's."""
    return {name: item for name, item in of(objects, "Deployment").items() if service_of(item) in SERVICES}


def selects(selector: Object, labels: dict[str, str]) -> bool:
    """Kubernetes' label selector."""
    wanted = selector.get("matchLabels", {}).items() <= labels.items()
    for expression in selector.get("matchExpressions", ()):
        assert expression["operator"] == "In", expression
        wanted = wanted and labels.get(expression["key"]) in expression["values"]
    return wanted


def selected(objects: list[Object], selector: Object) -> list[str]:
    deployments = of(objects, "Deployment")
    return [
        name for name, item in deployments.items() if selects(selector, item["spec"]["template"]["metadata"]["labels"])
    ]


def container_ports(container: Object) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in container["ports"]}


@functools.cache
def settings_of(service: str) -> type[ServiceSettings]:
    """The settings class of a service, which is the one in its settings module that has the most fields."""
    module = importlib.import_module(f"services.{service.replace('-', '_')}.settings")
    found = [
        kind
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, ServiceSettings) and kind is not ServiceSettings
    ]
    return max(found, key=lambda kind: len(kind.model_fields))


def environment(objects: list[Object], container: Object) -> dict[str, str]:
    """What the container's program reads, later sources over earlier ones as Kubernetes has it."""
    maps = of(objects, "ConfigMap")
    values: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        values |= maps[source["configMapRef"]["name"]]["data"]
    for item in container.get("env", ()):
        values[item["name"]] = item.get("value", "set by the pod")
    return values


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_object_is_what_kubernetes_takes(folder: str) -> None:
    """Schema of the current Kubernetes, unknown fields refused; one name per kind; all in our namespace."""
    objects = built(folder)
    names = [(item["apiVersion"], item["kind"], item["metadata"]["name"]) for item in objects]
    assert len(names) == len(set(names))
    for item in objects:
        assert item["metadata"].get("namespace", item["metadata"]["name"]) == "autoglm", item["metadata"]
        if not item["apiVersion"].startswith(ISTIO):
            kubernetes_validate.validate(item, VERSION, strict=True)


def test_the_pod_that_loads_the_model_is_what_kubernetes_takes() -> None:
    """It is outside the kustomizations, so it is checked alone: its schema, its volume and its image."""
    loader = yaml.safe_load((KUBERNETES / "load-model.yaml").read_text())
    kubernetes_validate.validate(loader, VERSION, strict=True)
    objects = built("base")
    assert loader["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] in of(objects, "PersistentVolumeClaim")
    assert loader["spec"]["containers"][0]["image"] == program(of(objects, "Deployment")["tokenizer"])["image"]


def test_the_check_itself_sees_mistakes() -> None:
    """A misspelt field, deep inside, and a wrong type are found."""
    deployment = of(built("base"), "Deployment")["gateway"]
    for place, value in (("readynessProbe", {}), ("ports", [{"containerPort": "http"}])):
        wrong = copy.deepcopy(deployment)
        program(wrong)[place] = value
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(wrong, VERSION, strict=True)


@pytest.mark.parametrize("folder", FOLDERS)
def test_names_lead_to_what_they_name(folder: str) -> None:
    """Selectors meet pods, accounts, volumes and configuration exist, ports are ports of the pods, budgets and scalers
    have targets.
    """
    objects = kubernetes_objects(folder)
    accounts, maps, claims = (of(objects, kind) for kind in ("ServiceAccount", "ConfigMap", "PersistentVolumeClaim"))
    deployments = of(objects, "Deployment")
    assert set(accounts) == {*SERVICES, "ingress", *(["eastwest"] if "eastwest" in deployments else [])}
    for name, item in deployments.items():
        assert selects(item["spec"]["selector"], item["spec"]["template"]["metadata"]["labels"]), name
        assert selected(objects, item["spec"]["selector"]) == [name], f"{name}: the selector meets other pods too"
        assert pod(item)["serviceAccountName"] == service_of(item)
        for spread in pod(item).get("topologySpreadConstraints", ()):
            assert name in selected(objects, spread["labelSelector"])
        mounted = {
            mount["name"]
            for container in (*pod(item).get("initContainers", ()), program(item))
            for mount in container.get("volumeMounts", ())
        }
        assert mounted == {volume["name"] for volume in pod(item).get("volumes", ())}, name
        for volume in pod(item).get("volumes", ()):
            assert volume.get("configMap", {}).get("name") in {None, *maps}
            assert volume.get("persistentVolumeClaim", {}).get("claimName") in {None, *claims}
        for source in program(item).get("envFrom", ()):
            assert source["configMapRef"]["name"] in maps
    for name, item in of(objects, "Service").items():
        behind = selected(objects, {"matchLabels": item["spec"]["selector"]})
        assert behind, f"Service {name} meets no pod"
        for port in item["spec"]["ports"]:
            for deployment in behind:
                assert port["targetPort"] in container_ports(program(deployments[deployment])), (name, port)
    for name, item in of(objects, "PodDisruptionBudget").items():
        assert selected(objects, item["spec"]["selector"]), f"PodDisruptionBudget {name} meets no pod"
    budgeted = [
        found
        for item in of(objects, "PodDisruptionBudget").values()
        for found in selected(objects, item["spec"]["selector"])
    ]
    assert sorted(budgeted) == sorted(deployments), "each Deployment has one budget"
    for item in of(objects, "HorizontalPodAutoscaler").values():
        target = item["spec"]["scaleTargetRef"]
        assert target["kind"] == "Deployment"
        assert "replicas" not in deployments[target["name"]]["spec"], "an apply would undo what the autoscaler did"
    for name, item in of(objects, "NetworkPolicy").items():
        behind = selected(objects, item["spec"]["podSelector"])
        assert behind, f"NetworkPolicy {name} meets no pod"
        if not item["spec"]["podSelector"]:
            continue
        for rule in item["spec"].get("ingress", ()):
            for port in rule["ports"]:
                for deployment in behind:
                    known = container_ports(program(deployments[deployment]))
                    if isinstance(port["port"], str):
                        assert port["port"] in known, (name, port)


def test_ports_speak_their_protocol_to_istio() -> None:
    """Each Service port is named and typed so that Istio neither guesses nor falls back to plain TCP."""
    for item in of(kubernetes_objects("base"), "Service").values():
        for port in item["spec"]["ports"]:
            assert port["appProtocol"] in {"grpc", "http"}
            assert port["name"].split("-")[0] == port["appProtocol"]


def test_services_are_where_the_policy_and_the_local_topology_say() -> None:
    """Names, ports and version labels that istio/ and deploy/local/mesh.yaml rely on are those of the cluster."""
    objects = kubernetes_objects("base")
    local = yaml.safe_load((ROOT / "deploy" / "local" / "mesh.yaml").read_text())["services"]
    services = of(objects, "Service")
    for name, spec in local.items():
        assert {port["number"] for port in spec["ports"]} == {port["port"] for port in services[name]["spec"]["ports"]}
    versions = {
        item["spec"]["template"]["metadata"]["labels"].get("version")
        for item in of(objects, "Deployment").values()
        if service_of(item) == "sparse-inference"
    }
    rules = [item for item in built("overlays/small") if item["kind"] == "DestinationRule"]
    (subsets,) = [item["spec"]["subsets"] for item in rules if item["metadata"]["name"] == "sparse-inference"]
    assert versions == {subset["labels"]["version"] for subset in subsets}
    doors = [item for item in built("overlays/small") if item["kind"] == "Gateway"]
    for door in doors:
        behind = selected(objects, {"matchLabels": door["spec"]["selector"]})
        assert behind == [door["metadata"]["name"]]
        numbers = {port["port"] for port in services[behind[0]]["spec"]["ports"]}
        assert {server["port"]["number"] for server in door["spec"]["servers"]} <= numbers


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_variable_is_a_setting_and_its_value_is_taken(folder: str) -> None:
    """A misspelt AUTOGLM_ variable would be ignored by the program; here it fails. Values pass the settings' bounds."""
    objects = kubernetes_objects(folder)
    for name, item in ours(objects).items():
        kind = settings_of(service_of(item))
        values = environment(objects, program(item))
        given = {key: value for key, value in values.items() if key.startswith("AUTOGLM_")}
        fields = {key.removeprefix("AUTOGLM_").lower() for key in given}
        assert fields <= kind.model_fields.keys(), f"{name}: {sorted(fields - kind.model_fields.keys())}"
        read = {key.removeprefix("AUTOGLM_").lower(): value for key, value in given.items()}
        kind.model_validate_strings(read)


def test_the_ports_the_programs_take_are_those_of_the_pods() -> None:
    """Configured ports, the container's ports and what the images say are one."""
    objects = kubernetes_objects("base")
    for name, item in ours(objects).items():
        values, ports = environment(objects, program(item)), container_ports(program(item))
        assert ports["grpc"] == int(values["AUTOGLM_GRPC_PORT"]) and ports["metrics"] == int(
            values["AUTOGLM_METRICS_PORT"]
        )
        assert values["AUTOGLM_BIND"] == "0.0.0.0"
        if name == "gateway":
            assert ports["http-rest"] == int(values["AUTOGLM_REST_PORT"])
    for dockerfile in sorted((ROOT / "deploy" / "images").glob("*.Dockerfile")):
        (exposed,) = [rest for name, rest in instructions(dockerfile) if name == "EXPOSE"]
        assert set(exposed.split()) == {"50051", "9090"}


def test_prometheus_is_shown_the_way_to_the_metrics() -> None:
    """The annotations by which Istio's agent finds the program's page name its port and path."""
    for item in ours(kubernetes_objects("base")).values():
        told = item["spec"]["template"]["metadata"]["annotations"]
        assert told["prometheus.io/scrape"] == "true" and told["prometheus.io/path"] == "/metrics"
        assert int(told["prometheus.io/port"]) == container_ports(program(item))["metrics"]


def _servicers(service: str) -> set[str]:
    """Full names of the gRPC services that a service offers, read from its protos."""
    found = set()
    for path in (ROOT / "protos" / "autoglm" / service.replace("-", "_")).rglob("*.proto"):
        text = path.read_text()
        package = re.search(r"^package ([\w.]+);", text, re.MULTILINE)
        assert package is not None
        found |= {f"{package[1]}.{name}" for name in re.findall(r"^service (\w+)", text, re.MULTILINE)}
    return found


def test_probes_tell_the_truth() -> None:
    """Startup and readiness ask for the service itself, which is NOT_SERVING before the model is there and from the
    beginning of a drain; liveness asks only whether the process turns, so a slow peer never restarts anyone.
    """
    for name, item in ours(kubernetes_objects("base")).items():
        container = program(item)
        probes = {kind: container[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")}
        for probe in probes.values():
            assert probe["grpc"]["port"] == container_ports(container)["grpc"]
        known = _servicers(service_of(item))
        assert probes["startup"]["grpc"]["service"] in known and probes["readiness"]["grpc"]["service"] in known, name
        assert probes["liveness"]["grpc"].get("service", "") == ""


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_drain_fits_into_the_grace(folder: str) -> None:
    """preStop, the drain's own time and what follows it end before the kubelet kills; the sidecar outlives them."""
    objects = kubernetes_objects(folder)
    for name, item in of(objects, "Deployment").items():
        proxy = yaml.safe_load(item["spec"]["template"]["metadata"]["annotations"]["proxy.istio.io/config"])
        sidecar_s = int(proxy["terminationDrainDuration"].removesuffix("s"))
        grace_s = pod(item)["terminationGracePeriodSeconds"]
        assert grace_s > sidecar_s, name
        if service_of(item) not in SERVICES:
            continue
        assert proxy["holdApplicationUntilProxyStarts"] is True
        values = environment(objects, program(item))
        drain_s = float(values["AUTOGLM_DRAIN_GRACE_S"]) + float(values.get("AUTOGLM_CACHE_SPILL_S", 0))
        before_s = program(item)["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert grace_s >= before_s + drain_s + ROUND_TRIP_S, name
        assert sidecar_s >= float(values["AUTOGLM_DRAIN_GRACE_S"]) + ROUND_TRIP_S, name


@pytest.mark.parametrize("folder", FOLDERS)
def test_pods_keep_the_restricted_standard(folder: str) -> None:
    """Nobody is root, only volumes are writable, no capability, no token, seccomp, memory bounded, CPU asked for."""
    for name, item in of(kubernetes_objects(folder), "Deployment").items():
        spec = pod(item)
        context = spec["securityContext"]
        assert context["runAsNonRoot"] is True and context["runAsUser"] > 0, name
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec.keys().isdisjoint({"hostNetwork", "hostPID", "hostIPC"})
        if service_of(item) in SERVICES:
            assert spec["automountServiceAccountToken"] is False
            assert {("USER", f"{context['runAsUser']}:{context['runAsGroup']}")} <= set(_instructions(item))
        for container in (*spec.get("initContainers", ()), *spec["containers"]):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["limits"]["memory"] and container["resources"]["requests"]["cpu"]
        for volume in spec.get("volumes", ()):
            assert volume.keys() <= {"name", "emptyDir", "configMap", "persistentVolumeClaim"}
            if "emptyDir" in volume:
                assert "sizeLimit" in volume["emptyDir"], "every buffer has a bound"


def _instructions(deployment: Object) -> list[tuple[str, str]]:
    kind = "kernels" if service_of(deployment) == "sparse-inference" else "service"
    return instructions(ROOT / "deploy" / "images" / f"{kind}.Dockerfile")


def test_what_a_program_writes_lies_on_a_volume() -> None:
    """Every path among the settings is below a mount, and one that is written to below a writable one."""
    for name, item in ours(kubernetes_objects("base")).items():
        mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in program(item).get("volumeMounts", ())}
        for key, value in environment(kubernetes_objects("base"), program(item)).items():
            for path in re.findall(r"(?:^|=)(/[\w./-]+)", value):
                above = [place for place in mounts if path.startswith(place + "/")]
                assert above, f"{name}: {key}={path} is on no volume"
                is_read = key in ("AUTOGLM_MODELS", "AUTOGLM_MODEL_DIR")
                assert mounts[above[0]] is is_read, f"{name}: {key}={path}"


def test_disks_hold_what_the_settings_allow() -> None:
    """The cache's and the scheduler's volumes are larger than everything they may keep."""
    objects = kubernetes_objects("base")
    deployments = of(objects, "Deployment")
    values = environment(objects, program(deployments["cache"]))
    kept = int(values["AUTOGLM_CACHE_DISK_BYTES"]) + int(values["AUTOGLM_CACHE_ARTIFACT_BYTES"])
    spilled = int(values["AUTOGLM_CACHE_MEMORY_BYTES"])
    assert _volume_bytes(deployments["cache"]) >= kept + spilled
    values = environment(objects, program(deployments["scheduler"]))
    logs = int(values["AUTOGLM_DECISION_LOG_BYTES"]) * (int(values["AUTOGLM_DECISION_LOG_SEGMENTS"]) + 1)
    assert _volume_bytes(deployments["scheduler"]) >= logs
    packed = sizing.packed_bytes(ROOT / "models" / "glm-tiny", "int8")
    assert _volume_bytes(deployments["sparse-inference-v1"]) >= 2 * packed


def _volume_bytes(deployment: Object) -> int:
    (limit,) = [volume["emptyDir"]["sizeLimit"] for volume in pod(deployment)["volumes"] if "emptyDir" in volume]
    return quantity(limit)


def quantity(text: str) -> int:
    """Bytes of a Kubernetes quantity with a binary suffix."""
    units = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}
    return int(text[:-2]) * units[text[-2:]]


def test_requests_are_not_less_than_what_was_measured() -> None:
    """CPU and memory of each program cover what benchmarks.sizing derives from benchmarks/results, and no more than
    twice as much; the worker has a CPU for each of its threads.
    """
    objects = kubernetes_objects("base")
    for name, item in ours(objects).items():
        values = environment(objects, program(item))
        if service_of(item) == "sparse-inference":
            threads, kv_mib = int(values["AUTOGLM_THREADS"]), int(values["AUTOGLM_KV_CAPACITY_MIB"])
            packed = sizing.packed_bytes(ROOT / "models" / "glm-tiny", values["AUTOGLM_PRECISION"])
            wanted = sizing.worker(packed, threads, kv_mib)
        else:
            tier_mib = int(values.get("AUTOGLM_CACHE_MEMORY_BYTES", 0)) >> 20
            wanted = sizing.plain(name, sizing.measured_rate(), tier_mib)
        asked, limits = program(item)["resources"]["requests"], program(item)["resources"]["limits"]
        assert _milli(asked["cpu"]) >= wanted.cpu_m, f"{name}: {wanted.because}"
        assert wanted.memory_mib <= quantity(asked["memory"]) >> 20 <= 2 * wanted.memory_mib, (
            f"{name}: {wanted.because}"
        )
        assert quantity(limits["memory"]) >> 20 >= wanted.limit_mib


def _milli(text: str) -> int:
    return int(text[:-1]) if text.endswith("m") else 1000 * int(text)


def test_the_model_is_checked_before_it_serves() -> None:
    """The digests in the ConfigMap are those of the model in this repository, and workers check them first."""
    objects = kubernetes_objects("base")
    (name,) = [key for key in of(objects, "ConfigMap") if key.startswith("model-digests")]
    listed = dict(
        reversed(line.split("  ", 1)) for line in of(objects, "ConfigMap")[name]["data"]["SHA256SUMS"].splitlines()
    )
    for path, digest in listed.items():
        assert hashlib.sha256((ROOT / "models" / path).read_bytes()).hexdigest() == digest, path
    needed = {"config.json", "model.safetensors", "tokenizer.json"}
    assert {Path(path).name for path in listed} >= needed
    for item in ours(objects).values():
        if service_of(item) == "sparse-inference":
            (check,) = pod(item)["initContainers"]
            assert check["command"][:3] == ["sha256sum", "--check", "--strict"]
            assert check["workingDir"] == "/models"


def scaled() -> dict[str, list[tuple[str, float]]]:
    """Service → (metric, value at which a pod is full enough)."""
    objects = kubernetes_objects("base")
    found = {}
    for item in of(objects, "HorizontalPodAutoscaler").values():
        target = of(objects, "Deployment")[item["spec"]["scaleTargetRef"]["name"]]
        metrics = [entry["pods"] for entry in item["spec"]["metrics"]]
        found[service_of(target)] = [
            (entry["metric"]["name"], _number(entry["target"]["averageValue"])) for entry in metrics
        ]
    return found


def _number(text: str) -> float:
    return int(text[:-1]) / 1000 if text.endswith("m") else float(text)


@pytest.mark.parametrize("service", ["gateway", "tokenizer", "sparse-inference"])
def test_autoscaling_asks_for_metrics_that_the_program_exports(service: str) -> None:
    """The started program's own page has each metric, as a gauge; at rest it is below its target."""
    wanted = scaled()[service]
    model = {"AUTOGLM_MODEL_DIR": "models/glm-tiny", "AUTOGLM_KV_CAPACITY_MIB": "16", "AUTOGLM_THREADS": "1"}
    with running(f"services.{service.replace('-', '_')}", AUTOGLM_REST_PORT="0", **model) as process:
        # A labelled gauge has a value from its first label on: one call makes the tokenizer's.
        from services.chassis.probe import is_serving

        assert is_serving(process.address)
        families = {family.name: family for family in text_string_to_metric_families(process.metrics())}
    for name, full in wanted:
        assert families[name].type == "gauge", name
        assert sum(sample.value for sample in families[name].samples) < full


def test_autoscalers_act_before_the_programs_refuse() -> None:
    """Targets are below the bounds in the settings, and singletons have no autoscaler."""
    objects = kubernetes_objects("base")
    full = scaled()
    assert set(full) == {"gateway", "tokenizer", "sparse-inference"}
    values = environment(objects, program(of(objects, "Deployment")["gateway"]))
    assert dict(full["gateway"])["autoglm_gateway_choices_in_flight"] < int(values["AUTOGLM_MAX_IN_FLIGHT"])
    bound = settings_of("tokenizer").model_fields["max_concurrent_rpcs"].default
    assert dict(full["tokenizer"])["autoglm_rpc_in_flight"] < bound
    waiting = settings_of("sparse-inference").model_fields["max_waiting"].default
    assert dict(full["sparse-inference"])["autoglm_requests_waiting"] < waiting
    assert 0 < dict(full["sparse-inference"])["autoglm_kv_used_ratio"] < 1


def arrows(objects: list[Object]) -> tuple[set[tuple[str, str]], set[tuple[str, str]]]:
    """(caller, called) pairs that NetworkPolicies let in, and those that they let out, among our own pods."""
    incoming, outgoing = set(), set()
    for item in of(objects, "NetworkPolicy").values():
        for here in _apps(objects, item["spec"]["podSelector"]):
            for rule in item["spec"].get("ingress", ()):
                for peer in rule.get("from", ()):
                    incoming |= {(there, here) for there in _apps(objects, peer.get("podSelector"))}
            for rule in item["spec"].get("egress", ()):
                for peer in rule.get("to", ()):
                    outgoing |= {(here, there) for there in _apps(objects, peer.get("podSelector"))}
    return incoming, outgoing


def _apps(objects: list[Object], selector: Object | None) -> set[str]:
    if selector is None:
        return set()
    return {service_of(of(objects, "Deployment")[name]) for name in selected(objects, selector)}


def dialled() -> set[tuple[str, str]]:
    """(caller, called) pairs in the code: `connect(settings, "name")`; and the picker, asked by the gateway's Envoy."""
    found = set()
    for service in SERVICES:
        for path in (ROOT / "services" / service.replace("-", "_")).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "connect" and len(node.args) == 2:
                    found.add((service, str(ast.literal_eval(node.args[1]))))
    pools = [item for item in built("overlays/small") if item["kind"] == "InferencePool"]
    for pool in pools:
        picker, picked = pool["spec"]["endpointPickerRef"]["name"], pool["spec"]["selector"]["matchLabels"]["app"]
        found |= {(caller, picker) for caller, called in found if called == picked}
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_network_policies_are_the_arrows_of_the_code(folder: str) -> None:
    """Who calls whom in the code, and the door to the gateway, may; nobody else, seen from both ends."""
    objects = kubernetes_objects(folder)
    incoming, outgoing = arrows(objects)
    between = {pair for pair in incoming if "eastwest" not in pair}
    assert between == dialled() | {("ingress", "gateway")}
    assert incoming == outgoing
    everyone = of(objects, "NetworkPolicy")["deny-by-default"]["spec"]
    assert everyone == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


def authorised(objects: list[Object]) -> Iterator[tuple[str, str]]:
    """(caller, called) pairs that AuthorizationPolicies allow."""
    for item in objects:
        if item["kind"] != "AuthorizationPolicy" or item["spec"].get("action", "ALLOW") != "ALLOW":
            continue
        called = item["spec"].get("selector", {}).get("matchLabels", {}).get("app")
        for rule in item["spec"].get("rules", ()):
            for source in rule.get("from", ()):
                for principal in source["source"].get("principals", ()):
                    yield principal.rpartition("/")[2], called


@pytest.mark.parametrize("name", OVERLAYS)
def test_network_policies_are_the_arrows_of_the_authorization(name: str) -> None:
    """istio/ and the NetworkPolicies allow the same pairs of services."""
    objects = built(f"overlays/{name}")
    allowed = {pair for pair in authorised(objects) if pair[0] != "eastwest"}
    if not any(item["kind"] == "AuthorizationPolicy" for item in objects):
        pytest.skip("istio/base has no AuthorizationPolicy")
    incoming, _ = arrows(kubernetes_objects(f"overlays/{name}"))
    assert {pair for pair in incoming if "eastwest" not in pair} == allowed


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_brings_services_and_traffic_policy_together(name: str) -> None:
    """One `kubectl apply -k` gives all: everything of the base, and what this cloud's istio/ overlay says."""
    policy = f"istio/clouds/{name}" if name != "small" else "istio/base"
    present = {(item["kind"], item["metadata"]["name"]) for item in built(f"overlays/{name}")}
    assert {(item["kind"], item["metadata"]["name"]) for item in build(ROOT / policy)} <= present
    assert {(item["kind"], item["metadata"]["name"]) for item in built("base")} <= present
    for item in of(built(f"overlays/{name}"), "Deployment").values():
        if name != "small":
            assert "topology.kubernetes.io/region" in pod(item)["nodeSelector"]


def test_clouds_differ_in_region_and_storage_only() -> None:
    """Each cloud has a region, a network and a class of storage of its own; the Deployments are otherwise equal."""
    seen: dict[str, set[str]] = {"region": set(), "network": set(), "class": set()}
    bodies = set()
    for name in ("aws", "gcp", "azure"):
        objects = kubernetes_objects(f"overlays/{name}")
        deployments = of(objects, "Deployment")
        regions = {pod(item).pop("nodeSelector")["topology.kubernetes.io/region"] for item in deployments.values()}
        assert len(regions) == 1
        network = of(objects, "Service")["eastwest"]["metadata"]["labels"]["topology.istio.io/network"]
        labels = deployments["eastwest"]["spec"]["template"]["metadata"]["labels"]
        assert labels.pop("topology.istio.io/network") == network
        seen["region"] |= regions
        seen["network"].add(network)
        seen["class"].add(of(objects, "PersistentVolumeClaim")["models"]["spec"]["storageClassName"])
        bodies.add(json.dumps(deployments, sort_keys=True))
    assert {key: len(values) for key, values in seen.items()} == {"region": 3, "network": 3, "class": 3}
    assert len(bodies) == 1
