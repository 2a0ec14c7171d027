"""The component by which a cluster takes its models by digest from a shared object store, built by Kustomize itself."""

from __future__ import annotations

import os
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from services.cache.settings import CacheSettings
from services.sparse_inference.settings import WorkerSettings
from services.tokenizer.settings import TokenizerSettings
from tests.contract.test_kubernetes_manifests import VERSION, Object, environment, of, pod, program
from tests.fakes.kustomize import build

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
DIGEST = "sha256:" + "ab" * 32
CHANGED = ("cache", "sparse-inference-v1", "sparse-inference-canary", "tokenizer")


@pytest.fixture(params=["small", "aws"])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> list[Object]:
    """An overlay as docs/kubernetes.md describes it, over one of ours."""

    def merged(name: str, *literals: str) -> Object:
        return {"name": name, "behavior": "merge", "literals": list(literals)}

    outer = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": "autoglm",
        "resources": [os.path.relpath(KUBERNETES / "overlays" / request.param, tmp_path)],
        "components": [os.path.relpath(KUBERNETES / "components" / "models-by-digest", tmp_path)],
        "configMapGenerator": [
            merged("cache-settings", "AUTOGLM_CACHE_ARTIFACT_URL=gs://ours/models"),
            merged("sparse-inference-settings", f"AUTOGLM_MODEL_DIR={DIGEST}"),
            merged("tokenizer-settings", f"AUTOGLM_MODELS=glm-tiny={DIGEST}"),
        ],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(outer))
    return build(tmp_path)


def test_every_changed_object_is_what_kubernetes_takes(objects: list[Object]) -> None:
    """Strictly, by Kubernetes' own schemas; and the component is not empty."""
    for name in CHANGED:
        kubernetes_validate.validate(of(objects, "Deployment")[name], VERSION, strict=True)
    policy = of(objects, "NetworkPolicy")["cache-to-object-store"]
    kubernetes_validate.validate(policy, VERSION, strict=True)
    assert policy["spec"]["egress"] == [{"ports": [{"protocol": "TCP", "port": 443}]}]
    assert policy["metadata"]["namespace"] == "autoglm"


def test_nothing_reads_the_volume_and_what_is_written_has_a_place(objects: list[Object]) -> None:
    """No pod mounts `models` or checks it first; each mount has its volume, each volume a bound."""
    for name in CHANGED:
        spec = pod(of(objects, "Deployment")[name])
        volumes = {volume["name"]: volume for volume in spec.get("volumes", ())}
        assert "models" not in volumes and not spec.get("initContainers"), name
        assert {mount["name"] for mount in program(of(objects, "Deployment")[name])["volumeMounts"]} == set(volumes)
        assert all("sizeLimit" in volume["emptyDir"] for volume in volumes.values())


def test_the_programs_take_what_they_are_told(objects: list[Object]) -> None:
    """URL and digests arrive as settings that the programs accept; files go below a writable mount."""
    kinds = {"cache": CacheSettings, "sparse-inference-v1": WorkerSettings, "tokenizer": TokenizerSettings}
    for name, kind in kinds.items():
        container = program(of(objects, "Deployment")[name])
        secrets = [source["secretRef"] for source in container["envFrom"] if "secretRef" in source]
        assert secrets == ([{"name": "object-store", "optional": True}] if name == "cache" else [])
        container["envFrom"] = [source for source in container["envFrom"] if "configMapRef" in source]
        values = environment(objects, container)
        read = {key.removeprefix("AUTOGLM_").lower(): value for key, value in values.items() if key[:8] == "AUTOGLM_"}
        settings = kind.model_validate_strings(read)
        if isinstance(settings, CacheSettings):
            assert settings.cache_artifact_url == "gs://ours/models"
        else:
            assert str(settings.cache_dir).startswith("/var/lib/autoglm/")
            assert DIGEST in str(settings.model_dump())
