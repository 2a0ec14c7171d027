"""Overlays: what a kustomization gives here is what Kustomize itself gives, and what is not understood is refused."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.mesh.policy import PolicyError, load
from services.mesh.policy.kustomize import folders, sources
from services.mesh.policy.patching import PatchError, json_patch, merge
from services.mesh.policy.reading import DEFAULT_LIMITS

ROOT = Path(__file__).resolve().parents[3]
CLOUDS = sorted(path.name for path in (ROOT / "istio" / "clouds").iterdir() if path.name != "every")
HEAD = "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n"
RULE = (
    "apiVersion: networking.istio.io/v1\nkind: DestinationRule\n"
    "metadata: {name: cache, namespace: autoglm}\nspec: {host: cache}\n"
)


def built(folder: Path) -> dict[tuple[str, str], Any]:
    """The objects of a folder, by kind and name. Fails on any problem."""
    problems: list[Any] = []
    found = {
        (item.document["kind"], item.document["metadata"]["name"]): item.document
        for item in sources(folder, DEFAULT_LIMITS, problems)
    }
    assert problems == []
    return found


def complaint(folder: Path) -> str:
    """Why the folder is refused."""
    with pytest.raises(PolicyError) as caught:
        load(folder)
    return str(caught.value.problems[0])


def overlay(tmp_path: Path, text: str, **files: str) -> Path:
    """A folder with a kustomization over a base of one object."""
    base, folder = tmp_path / "base", tmp_path / "overlay"
    base.mkdir()
    folder.mkdir()
    (base / "kustomization.yaml").write_text(HEAD + "resources: [cache.yaml]\n")
    (base / "cache.yaml").write_text(RULE)
    (folder / "kustomization.yaml").write_text(HEAD + "resources: [../base]\n" + text)
    for name, content in files.items():
        (folder / f"{name}.yaml").write_text(content)
    return folder


@pytest.mark.parametrize("cloud", CLOUDS)
def test_an_overlay_gives_what_kubectl_kustomize_gives(cloud: str) -> None:
    """Object by object, field by field, for each cloud."""
    if shutil.which("kubectl") is None:
        pytest.skip("there is no kubectl: our reading of the overlays is NOT compared with Kustomize's")
    folder = ROOT / "istio" / "clouds" / cloud
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False)
    if "unknown" in done.stderr:
        pytest.skip(f"this kubectl has an older Kustomize: {done.stderr.strip()[:200]}")
    assert done.returncode == 0, done.stderr
    theirs = {(item["kind"], item["metadata"]["name"]): item for item in yaml.safe_load_all(done.stdout)}
    assert built(folder) == theirs


@pytest.mark.parametrize("cloud", CLOUDS)
def test_an_overlay_differs_from_the_others_in_its_own_files_only(cloud: str) -> None:
    """Every object of the base is there, and beside the door to the other clouds and the tokens nothing else."""
    base = {(item.kind, item.metadata.name) for item in load(ROOT / "istio" / "base")}
    assert set(built(ROOT / "istio" / "clouds" / cloud)) == base | {
        ("Gateway", "eastwest"),
        ("AuthorizationPolicy", "eastwest"),
        ("RequestAuthentication", "ingress"),
        ("AuthorizationPolicy", "tokens"),
    }


def test_the_base_lists_each_of_its_files() -> None:
    """A file that is not listed would be read here and be missing in a cluster."""
    base = ROOT / "istio" / "base"
    listed = yaml.safe_load((base / "kustomization.yaml").read_text())["resources"]
    assert sorted(listed) == sorted(path.name for path in base.glob("*.yaml") if path.name != "kustomization.yaml")


def test_whoever_waits_for_changes_is_told_every_folder() -> None:
    """The overlay's own, the components' and the base's."""
    found = {path.name for path in folders(ROOT / "istio" / "clouds" / CLOUDS[0], DEFAULT_LIMITS)}
    assert found == {CLOUDS[0], "every", "jwt", "base"}


@pytest.mark.parametrize(
    ("text", "files", "expected"),
    [
        ("namePrefix: x-\n", {}, "namePrefix is not supported here"),
        ("patches: [{path: gone.yaml}]\n", {}, "gone.yaml is neither a file nor a folder here"),
        ("patches: [{patch: '[{op: add, path: /a, value: 1}]'}]\n", {}, "a list of operations needs a target"),
        ("patches: [{path: p.yaml}]\n", {"p": RULE.replace("cache", "other")}, "no object is"),
        ("patches: [{path: p.yaml, options: {}}]\n", {"p": RULE}, "each has path or patch"),
        ("", {"stray": RULE}, "stray.yaml is not listed"),
        ("components: [../overlay]\n", {}, "is part of itself"),
        ("resources: [https://example.com/x]\n", {}, "key 'resources' is repeated"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(
    tmp_path: Path, text: str, files: dict[str, str], expected: str
) -> None:
    """Unknown keys, missing files, patches that fit nothing, files that do nothing, circles."""
    assert expected in complaint(overlay(tmp_path, text, **files))


def test_a_strategic_patch_merges_mappings_and_replaces_lists() -> None:
    """Null removes, and so does the directive."""
    old = {"a": {"b": 1, "c": [1, 2]}, "d": 4, "e": {"f": 1}}
    change = {"a": {"c": [3]}, "d": None, "e": {"$patch": "replace", "g": 2}}
    assert merge(old, change) == {"a": {"b": 1, "c": [3]}, "e": {"g": 2}}
    assert merge(old, {"$patch": "delete"}) is None


def test_operations_follow_rfc_6902() -> None:
    """Adding into a list moves the rest, `-` appends, `~1` is a slash, and a failed test stops everything."""
    old: dict[str, Any] = {"list": [1, 3], "a/b": {"c": 1}}
    operations: list[Any] = [
        {"op": "add", "path": "/list/1", "value": 2},
        {"op": "add", "path": "/list/-", "value": 4},
        {"op": "replace", "path": "/a~1b/c", "value": 9},
        {"op": "remove", "path": "/list/0"},
        {"op": "test", "path": "/list/0", "value": 2},
    ]
    assert json_patch(old, operations) == {"list": [2, 3, 4], "a/b": {"c": 9}}
    for wrong in ({"op": "test", "path": "/list/0", "value": 7}, {"op": "remove", "path": "/gone"}, {"op": "move"}):
        with pytest.raises(PatchError):
            json_patch(old, [wrong])
