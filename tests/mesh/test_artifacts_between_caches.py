"""Cache processes of two clouds over one object store (S3 over HTTP), and `autoglm model push` and `pull`."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from autoglm.cache.v1 import cache_pb2 as pb
from autoglm.cache.v1 import cache_pb2_grpc

from tests.fakes.processes import REPOSITORY, Service, running
from tests.fakes.s3_server import FakeS3

FILES = {"config.json": b"{}", "model.safetensors": random.Random(7).randbytes(9 << 20), "notes.txt": b""}


@dataclass
class World:
    """Two caches and the store between them."""

    s3: FakeS3
    aws: Service
    azure: Service
    azure_directory: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("caches")
    with FakeS3() as s3:
        told = s3.environment | {
            "AUTOGLM_CACHE_ARTIFACT_URL": s3.url,
            "AUTOGLM_CACHE_ARTIFACT_ALLOW_HTTP": "true",
            "AUTOGLM_CACHE_ARTIFACT_TIMEOUT_MS": "5000",
        }
        with (
            running("services.cache", **told, AUTOGLM_CACHE_DIRECTORY=str(root / "aws")) as aws,
            running("services.cache", **told, AUTOGLM_CACHE_DIRECTORY=str(root / "azure")) as azure,
        ):
            yield World(s3, aws, azure, root / "azure")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    place = tmp_path / "model"
    (place / "subfolder").mkdir(parents=True)
    for name, data in FILES.items():
        (place / name).write_bytes(data)
    (place / "pytorch_model.bin").write_bytes(b"pickled")
    (place / ".hidden").write_bytes(b"")
    return place


def autoglm(*arguments: str) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("AUTOGLM_")}
    return subprocess.run(
        [sys.executable, "-m", "autoglm.cli", "model", *arguments],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=50, check=False,
        env={**inherited, "PYTHONPATH": str(REPOSITORY / "sdk")},
    )  # fmt: skip


def get(service: Service, digest: str) -> bytes:
    with grpc.insecure_channel(service.address) as channel:
        stub = cache_pb2_grpc.CacheServiceStub(channel)
        return b"".join(answer.content for answer in stub.GetArtifact(pb.GetArtifactRequest(digest=digest), timeout=30))


def test_pushed_here_pulled_there(world: World, model: Path, tmp_path: Path) -> None:
    """One digest; only files of a model travel; pushing again sends nothing; the pulled files are the pushed ones."""
    first = json.loads(autoglm("push", str(model), "--cache", world.aws.address, "--json").stdout)
    assert (first["files"], first["new"]) == (3, 3)
    again = autoglm("push", str(model), "--cache", world.azure.address, "--json")
    assert json.loads(again.stdout)["digest"] == first["digest"], again.stderr
    plain = autoglm("push", str(model), "--cache", world.aws.address)
    assert plain.stdout == f"{first['digest']}\n"
    done = autoglm("pull", first["digest"], str(tmp_path / "pulled"), "--cache", world.azure.address)
    assert done.returncode == 0, done.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "pulled").iterdir()} == FILES


def test_a_store_that_dies_in_a_download_is_a_typed_error_and_leaves_nothing(world: World) -> None:
    """UNAVAILABLE with its reason, no part of a file on the disk, and the next call gets everything."""
    data = random.Random(8).randbytes(6 << 20)
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    world.s3.objects[world.s3.path_of(digest)] = data
    world.s3.cut_after = 100_000
    with pytest.raises(grpc.RpcError) as caught:
        get(world.azure, digest)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert dict(caught.value.trailing_metadata())["autoglm-reason"] == "UNAVAILABLE"
    assert list((world.azure_directory / "tmp").iterdir()) == []
    world.s3.cut_after = None
    assert get(world.azure, digest) == data
    assert 'autoglm_cache_object_store_total{outcome="done",way="from"}' in world.azure.metrics()
    assert 'autoglm_fallback_total{kind="cache_object_store"}' in world.azure.metrics()


def test_damage_in_the_store_is_data_loss(world: World) -> None:
    """The right name, the wrong bytes: DATA_LOSS, never a whole answer; putting it again here mends it."""
    data = random.Random(9).randbytes(1000)
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    world.s3.objects[world.s3.path_of(digest)] = bytes(1000)
    with pytest.raises(grpc.RpcError) as caught:
        get(world.azure, digest)
    assert caught.value.code() is grpc.StatusCode.DATA_LOSS
    with grpc.insecure_channel(world.azure.address) as channel:
        stub = cache_pb2_grpc.CacheServiceStub(channel)
        stub.PutArtifact(iter([pb.PutArtifactRequest(digest=digest, content=data)]), timeout=30)
    assert get(world.aws, digest) == data


def test_the_command_says_what_is_wrong(world: World, tmp_path: Path) -> None:
    """No cache, no such digest, no such folder: one line and an exit code that says which kind."""
    with FakeS3() as nobody:
        port = nobody.environment["AWS_ENDPOINT_URL"].rpartition(":")[2]
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    absent = autoglm("push", str(tmp_path / "tiny.gguf"), "--cache", f"127.0.0.1:{port}")
    assert absent.returncode == 3 and "no cache answers" in absent.stderr
    unknown = autoglm("pull", "sha256:" + "0" * 64, str(tmp_path / "x"), "--cache", world.aws.address)
    assert unknown.returncode == 4 and "no artifact" in unknown.stderr
    wrong = autoglm("push", str(tmp_path / "nowhere"), "--cache", world.aws.address)
    assert wrong.returncode == 4 and "no such file" in wrong.stderr


@pytest.mark.parametrize("url", ["bucket", "az://container/x"])
def test_a_url_that_cannot_be_used_ends_the_start(tmp_path: Path, url: str) -> None:
    """Status 2, and the line names the setting."""
    environment = {"AUTOGLM_CACHE_ARTIFACT_URL": url, "AUTOGLM_CACHE_DIRECTORY": str(tmp_path)}
    with running("services.cache", ready=None, **environment) as process:
        assert process.wait(30) == 2
        assert any("AUTOGLM_CACHE_ARTIFACT_URL: " in line.get("text", "") for line in process.lines), process.log()
