"""Artifacts shared through an object store: a folder and S3 over HTTP, with the real client, and each in trouble."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from services.cache import files
from services.cache.artifacts import PIECE_BYTES, ArtifactStore
from services.cache.object_store import READ_BYTES, BadUrl, ObjectStore
from services.cache.settings import CacheSettings
from services.cache.shared_artifacts import SharedArtifacts, Stored
from services.chassis.errors import CorruptData, InvalidRequest, NotFound, Unavailable
from services.chassis.offload import Offload
from tests.fakes.s3_server import FakeS3

TIMEOUT_S = 5.0
CAPACITY = 16 << 20
LONG = READ_BYTES + 3 * PIECE_BYTES + 17


@pytest.fixture
async def offload() -> AsyncIterator[Offload]:
    pool = Offload("test", 4, 64)
    yield pool
    pool.close()


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeS3]:
    with FakeS3() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture(params=["file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return (tmp_path / "bucket").as_uri() if request.param == "file" else request.getfixturevalue("s3").url


async def cache(
    root: Path, url: str, offload: Offload, timeout_s: float = TIMEOUT_S, capacity: int = CAPACITY
) -> SharedArtifacts:
    """One cloud's cache over the object store."""
    files.clear_temporary(root)
    local = ArtifactStore(root, capacity, capacity, offload)
    await local.open()
    return SharedArtifacts(local, ObjectStore(url, timeout_s, timeout_s, allows_http=True), offload, 2)


def content(seed: int, size: int) -> tuple[str, bytes]:
    data = random.Random(seed).randbytes(size)
    return "sha256:" + hashlib.sha256(data).hexdigest(), data


async def pieces(data: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(data), PIECE_BYTES):
        yield data[start : start + PIECE_BYTES]


async def get(artifacts: SharedArtifacts, digest: str, offset: int = 0) -> bytes:
    found = [piece async for piece in artifacts.read(digest, offset)]
    assert found[0].offset == offset and all(len(piece.content) <= PIECE_BYTES for piece in found)
    return b"".join(piece.content for piece in found)


def fallbacks(kind: str) -> float:
    return REGISTRY.get_sample_value("autoglm_fallback_total", {"kind": kind}) or 0.0


def open_files() -> list[str]:
    return [os.path.realpath(f"/proc/self/fd/{each}") for each in os.listdir("/proc/self/fd")]


def left_over(root: Path) -> list[Path]:
    return list((root / "tmp").iterdir())


@pytest.mark.parametrize("size", [0, 1, LONG])
async def test_what_one_cache_was_given_another_finds(tmp_path: Path, offload: Offload, url: str, size: int) -> None:
    """Whole or from any offset; from then on it is the other's own, and is asked for no more."""
    one, two = await cache(tmp_path / "one", url, offload), await cache(tmp_path / "two", url, offload)
    digest, data = content(size, size)
    assert await one.put(digest, pieces(data)) == Stored(size, False)
    assert await one.put(digest, pieces(data)) == Stored(size, True)
    for offset in {size // 2, 0, size}:
        assert await get(two, digest, offset) == data[offset:]
    assert two.local.size_of(digest) == size and left_over(tmp_path / "two") == []
    with pytest.raises(InvalidRequest, match="past"):
        await get(two, digest, size + 1)


async def test_an_absent_digest_is_not_found(tmp_path: Path, offload: Offload, url: str) -> None:
    """Neither here nor there: NotFound, and the object store is not blamed for it."""
    artifacts = await cache(tmp_path / "one", url, offload)
    for _ in range(5):
        with pytest.raises(NotFound, match="object store"):
            await get(artifacts, content(1, 1)[0])


async def test_many_who_want_one_digest_cause_one_download(tmp_path: Path, offload: Offload, s3: FakeS3) -> None:
    """They follow it while it arrives, from wherever each begins."""
    artifacts = await cache(tmp_path / "one", s3.url, offload)
    digest, data = content(2, LONG)
    s3.objects[s3.path_of(digest)] = data
    offsets = [0, 1, LONG // 2, LONG, 0, LONG - 1]
    answers = await asyncio.gather(*(get(artifacts, digest, offset) for offset in offsets))
    assert answers == [data[offset:] for offset in offsets]
    assert s3.bodies() == -(-LONG // READ_BYTES)


async def test_damaged_content_never_arrives_whole(tmp_path: Path, offload: Offload, s3: FakeS3) -> None:
    """Its last piece is held back: a typed error, counted, nothing kept; putting it again mends the object."""
    artifacts = await cache(tmp_path / "one", s3.url, offload)
    digest, data = content(3, LONG)
    s3.objects[s3.path_of(digest)] = data[:-1] + bytes([data[-1] ^ 1])
    before, received = fallbacks("cache_object_store_corrupt"), 0
    with pytest.raises(CorruptData, match="damaged; publish it again"):
        async for piece in artifacts.read(digest, 0):
            received += len(piece.content)
    assert received < LONG and fallbacks("cache_object_store_corrupt") == before + 1
    assert artifacts.local.size_of(digest) is None and artifacts.local.occupancy().used_bytes == 0
    assert left_over(tmp_path / "one") == []
    await artifacts.put(digest, pieces(data))
    assert s3.objects[s3.path_of(digest)] == data


async def test_a_store_that_breaks_off_leaves_nothing_and_the_next_call_works(
    tmp_path: Path, offload: Offload, s3: FakeS3
) -> None:
    """Cut in the middle of a body: Unavailable, no part of a file, and a later call gets all of it."""
    artifacts = await cache(tmp_path / "one", s3.url, offload)
    digest, data = content(4, LONG)
    s3.objects[s3.path_of(digest)] = data
    s3.cut_after = 1000
    before = fallbacks("cache_object_store")
    with pytest.raises(Unavailable, match="read"):
        await get(artifacts, digest)
    assert fallbacks("cache_object_store") == before + 1
    assert left_over(tmp_path / "one") == [] and artifacts.local.occupancy().used_bytes == 0
    s3.cut_after = None
    assert await get(artifacts, digest) == data


async def test_a_hung_store_costs_one_timeout_and_then_nothing(tmp_path: Path, offload: Offload, s3: FakeS3) -> None:
    """Typed errors, a breaker that opens, and local artifacts served all the while."""
    artifacts = await cache(tmp_path / "one", s3.url, offload, timeout_s=0.3)
    kept, data = content(5, 1000)
    await artifacts.put(kept, pieces(data))
    s3.hang()
    for _ in range(3):
        with pytest.raises(Unavailable, match=r"no answer within 0\.3 s"):
            await get(artifacts, content(6, 10)[0])
    asked, before = len(s3.requests), fallbacks("cache_object_store_off")
    with pytest.raises(Unavailable, match="left alone"):
        await get(artifacts, content(6, 10)[0])
    assert len(s3.requests) == asked and fallbacks("cache_object_store_off") == before + 1
    assert await get(artifacts, kept) == data


async def test_an_absent_server_is_said_at_once(tmp_path: Path, offload: Offload, s3: FakeS3) -> None:
    """Nobody listens: Unavailable, and what is put is kept here, with an error that says so."""
    with s3:
        pass
    artifacts = await cache(tmp_path / "one", s3.url, offload)
    digest, data = content(7, 1000)
    with pytest.raises(Unavailable, match="kept in this cache only"):
        await artifacts.put(digest, pieces(data))
    assert await get(artifacts, digest) == data


async def test_a_store_that_takes_nothing_fails_the_put_until_it_does(
    tmp_path: Path, offload: Offload, s3: FakeS3
) -> None:
    """Success means that both have it; putting again sends only to the one that lacks it."""
    artifacts = await cache(tmp_path / "one", s3.url, offload)
    digest, data = content(8, 6 << 20)
    s3.refuses_writes = True
    with pytest.raises(Unavailable, match="kept in this cache only"):
        await artifacts.put(digest, pieces(data))
    assert s3.objects == {} and artifacts.local.size_of(digest) == len(data)
    s3.refuses_writes = False
    assert await artifacts.put(digest, pieces(b"not even read")) == Stored(len(data), True)
    assert s3.objects == {s3.path_of(digest): data} and s3.parts == {}


async def test_what_has_no_room_here_is_refused_before_it_is_fetched(
    tmp_path: Path, offload: Offload, s3: FakeS3
) -> None:
    """The size is asked first; the message names the settings."""
    artifacts = await cache(tmp_path / "one", s3.url, offload, capacity=1000)
    digest, data = content(9, 2000)
    s3.objects[s3.path_of(digest)] = data
    with pytest.raises(InvalidRequest, match="AUTOGLM_CACHE_MAX_ARTIFACT_BYTES"):
        await get(artifacts, digest)
    assert s3.bodies() == 0


async def test_damage_on_the_own_disk_is_mended_from_the_object_store(
    tmp_path: Path, offload: Offload, url: str
) -> None:
    """After a restart the first read proves the file; a bad one is fetched again instead of failing the caller."""
    digest, data = content(10, 3000)
    await (await cache(tmp_path / "one", url, offload)).put(digest, pieces(data))
    path = next((tmp_path / "one" / "artifacts").glob("*/*"))
    os.truncate(path, 10)
    again = await cache(tmp_path / "one", url, offload)
    assert await get(again, digest) == data and path.read_bytes() == data


async def test_who_leaves_does_not_stop_the_others(tmp_path: Path, offload: Offload, s3: FakeS3) -> None:
    """A cancelled caller closes nothing that another reads from."""
    artifacts = await cache(tmp_path / "one", s3.url, offload)
    digest, data = content(11, LONG)
    s3.objects[s3.path_of(digest)] = data
    s3.hang()
    leaving, staying = (asyncio.create_task(get(artifacts, digest)) for _ in range(2))
    assert await asyncio.to_thread(s3.seen.acquire, timeout=20)
    leaving.cancel()
    s3.wake()
    assert await staying == data
    await asyncio.wait([leaving])
    assert not [path for path in open_files() if str(tmp_path) in path]


@pytest.mark.parametrize(
    "url",
    [
        "bucket/prefix",
        "ftp://host/x",
        "s3://",
        "file://relative/x",
        "file:///",
        "s3://key:secret@bucket/x",
        "az://container/x?sig=secret",
    ],
)
def test_a_malformed_url_is_refused_by_the_settings(url: str) -> None:
    """Before anything starts, without asking anybody."""
    with pytest.raises(ValueError, match="cache_artifact_url"):
        CacheSettings(cache_artifact_url=url)


def test_a_store_that_cannot_be_opened_is_refused() -> None:
    """What only the library knows is said in one line: Azure needs an account."""
    with pytest.raises(BadUrl, match=r"[Aa]ccount"):
        ObjectStore("az://container/prefix", 1.0, 1.0, False)
    with pytest.raises(ValueError, match="AUTOGLM_CACHE_DIRECTORY"):
        CacheSettings(cache_artifact_url="file:///tmp/x", cache_directory="")
