"""A model by digest on real processes: pushed into one mesh's cache, served by another that has no file of it.

Two meshes with real Envoys, one after the other, and one folder between their caches as the object store.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import autoglm
import pytest
from autoglm.manifest import hexadecimal

pytest.importorskip("autoglm_kernels", reason="the kernels are not compiled: run `make test`")

from benchmarks.harness import Mesh, running
from services.mesh import model
from services.mesh.settings import BUNDLED_MODEL, MeshSettings

REPOSITORY = Path(__file__).resolve().parents[2]
PROMPT, TOKENS = "def read_lines(path):\n", 16

pytestmark = pytest.mark.timeout(180)


@dataclass(frozen=True)
class Pushed:
    """What a mesh that serves from files answered, and the digest that its cache was given."""

    digest: str
    url: str
    token_ids: tuple[int, ...]
    variant_digest: str
    again: dict[str, object]


def push(root: Path) -> dict[str, object]:
    """`autoglm model push` as a person types it."""
    done = subprocess.run(
        [sys.executable, "-m", "autoglm.cli", "model", "push", str(BUNDLED_MODEL), "--run-dir", str(root), "--json"],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "sdk")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


def ask(mesh: Mesh, name: str) -> tuple[tuple[int, ...], str]:
    with autoglm.Client(mesh.ingress, model=name, timeout=60) as client:
        answer = client.generate(PROMPT, max_tokens=TOKENS, temperature=0.0, logprobs=True)
    return tuple(token.token_id for token in answer.choices[0].tokens), answer.variant_digest


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Pushed:
    url = (tmp_path_factory.mktemp("shared") / "bucket").as_uri()
    with running(AUTOGLM_CACHE_ARTIFACT_URL=url) as mesh:
        first, again = push(mesh.directory.root), push(mesh.directory.root)
        token_ids, variant = ask(mesh, "glm-tiny")
    assert first["new"] == first["files"] and first["digest"] == again["digest"]
    return Pushed(str(first["digest"]), url, token_ids, variant, again)


def test_pushing_again_sends_nothing(pushed: Pushed) -> None:
    """Files that the cache has are only named."""
    assert pushed.again["new"] == 0


def test_a_mesh_without_a_file_of_it_serves_the_same_tokens(pushed: Pushed, tmp_path: Path) -> None:
    """Worker and tokenizer fetch through their sidecars; same variant, same tokens; the next start asks nobody."""
    kept = tmp_path / "kept"
    environment = {"AUTOGLM_MODEL_DIR": pushed.digest, "AUTOGLM_CACHE_DIR": str(kept)}
    with running(**environment, AUTOGLM_CACHE_ARTIFACT_URL=pushed.url) as mesh:
        name = model.name(MeshSettings(model_dir=Path(pushed.digest)))
        assert ask(mesh, name) == (pushed.token_ids, pushed.variant_digest)
    key = hexadecimal(pushed.digest)
    assert (kept / "models" / key / "model.safetensors").exists()
    text = kept / "models" / f"{key}.text"
    assert (text / "tokenizer.json").exists() and not (text / "model.safetensors").exists()
    with running(**environment) as mesh:  # no object store, an empty cache: what was proved is used
        assert ask(mesh, name)[0] == pushed.token_ids


def test_a_digest_that_nobody_has_ends_the_start_with_the_remedy(pushed: Pushed, tmp_path: Path) -> None:
    """The worker says which digest and what to do, and is not started again and again."""
    unknown = "sha256:" + "0" * 64
    environment = {"AUTOGLM_MODEL_DIR": unknown, "AUTOGLM_CACHE_DIR": str(tmp_path / "kept")}
    with pytest.raises(Exception, match=f"{unknown}.*autoglm model push"):
        with running(**environment, AUTOGLM_CACHE_ARTIFACT_URL=pushed.url):
            pass


def test_what_can_be_known_before_the_start_is_said_then(pushed: Pushed, tmp_path: Path) -> None:
    """No digest, a digest that this mesh cannot have, and one that an object store may have."""
    with pytest.raises(model.UnusableModel, match="hexadecimal"):
        model.check(MeshSettings(model_dir=Path("sha256:abc"), run_dir=tmp_path))
    with pytest.raises(model.UnusableModel, match="autoglm model push DIR"):
        model.check(MeshSettings(model_dir=Path(pushed.digest), run_dir=tmp_path))
    said = model.check(MeshSettings(model_dir=Path(pushed.digest), run_dir=tmp_path, cache_artifact_url=pushed.url))
    assert pushed.digest in said and "object store" in said
