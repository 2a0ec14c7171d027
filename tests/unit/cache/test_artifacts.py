"""Artifacts: proved before visible, resumed anywhere, bounded, dropped when damaged."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.cache import files
from services.cache.artifacts import PIECE_BYTES, ArtifactStore
from services.chassis.errors import CorruptData, InvalidRequest, NotFound
from services.chassis.offload import Offload

CAPACITY = 8 * PIECE_BYTES


@pytest.fixture
async def offload() -> AsyncIterator[Offload]:
    pool = Offload("test", 2, 64)
    yield pool
    pool.close()


async def opened(root: Path, offload: Offload) -> ArtifactStore:
    files.clear_temporary(root)
    store = ArtifactStore(root, CAPACITY, CAPACITY, offload)
    await store.open()
    return store


def content(seed: int, size: int) -> tuple[str, bytes]:
    data = random.Random(seed).randbytes(size)
    return "sha256:" + hashlib.sha256(data).hexdigest(), data


async def put(store: ArtifactStore, digest: str, data: bytes) -> None:
    async with store.begin(digest) as upload:
        for start in range(0, len(data), PIECE_BYTES // 3):
            await upload.write(data[start : start + PIECE_BYTES // 3])
        await upload.finish()


async def get(store: ArtifactStore, digest: str, offset: int = 0) -> bytes:
    pieces = [piece async for piece in store.read(digest, offset)]
    assert pieces[0].offset == offset
    return b"".join(piece.content for piece in pieces)


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES - 1, PIECE_BYTES, 2 * PIECE_BYTES + 17])
async def test_an_artifact_survives_and_resumes_anywhere(tmp_path: Path, offload: Offload, size: int) -> None:
    """Whole or from any offset, before and after a restart, the bytes are the same."""
    store = await opened(tmp_path, offload)
    digest, data = content(size, size)
    await put(store, digest, data)
    for each in (store, await opened(tmp_path, offload)):
        for offset in {0, size // 2, size}:
            assert await get(each, digest, offset) == data[offset:]
        with pytest.raises(InvalidRequest, match="past"):
            await get(each, digest, size + 1)


async def test_wrong_content_is_refused_and_removed(tmp_path: Path, offload: Offload) -> None:
    """A digest that does not fit leaves no file, no entry and no reserved bytes."""
    store = await opened(tmp_path, offload)
    digest, data = content(1, 1000)
    with pytest.raises(InvalidRequest, match="the content is not"):
        await put(store, digest, data[:-1] + b"!")
    with pytest.raises(NotFound):
        await get(store, digest)
    assert list((tmp_path / "tmp").iterdir()) == []
    assert store.occupancy().used_bytes == 0


@pytest.mark.parametrize(
    "digest", ["", "sha256:", "sha256:" + "A" * 64, "sha1:" + "a" * 64, "sha256:../../" + "a" * 58]
)
async def test_malformed_digests_are_refused(tmp_path: Path, offload: Offload, digest: str) -> None:
    """Nothing but a digest ever becomes a file name."""
    store = await opened(tmp_path, offload)
    with pytest.raises(InvalidRequest, match="hexadecimal"):
        store.begin(digest)
    with pytest.raises(InvalidRequest, match="hexadecimal"):
        await get(store, digest)


async def test_the_least_recently_used_leave(tmp_path: Path, offload: Offload) -> None:
    """The bound holds at every moment; reading keeps an artifact; a reader in the middle finishes."""
    store = await opened(tmp_path, offload)
    items = [content(seed, 3 * PIECE_BYTES) for seed in range(3)]
    await put(store, *items[0])
    await put(store, *items[1])
    reading = store.read(items[1][0], 0)
    first = await anext(reading)
    assert await get(store, items[0][0]) == items[0][1]
    await put(store, *items[2])
    assert store.size_of(items[1][0]) is None
    assert store.size_of(items[0][0]) == 3 * PIECE_BYTES
    assert first.content + b"".join([piece.content async for piece in reading]) == items[1][1]
    assert store.occupancy().used_bytes <= CAPACITY


async def test_too_large_an_artifact_is_refused_in_the_middle(tmp_path: Path, offload: Offload) -> None:
    """No more than the limit is ever written."""
    store = await opened(tmp_path, offload)
    digest, data = content(5, CAPACITY + 1)
    with pytest.raises(InvalidRequest, match="larger"):
        await put(store, digest, data)
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize("damage", ["flip", "truncate", "vanish"])
async def test_a_damaged_artifact_is_not_served(tmp_path: Path, offload: Offload, damage: str) -> None:
    """The first read after a start proves the file; a bad one is dropped and can be stored again."""
    digest, data = content(3, 2 * PIECE_BYTES)
    await put(await opened(tmp_path, offload), digest, data)
    store = await opened(tmp_path, offload)
    path = next((tmp_path / "artifacts").glob("*/*"))
    if damage == "flip":
        path.write_bytes(data[:-5] + b"#" + data[-4:])
    elif damage == "truncate":
        os.truncate(path, PIECE_BYTES)
    else:
        path.unlink()
    with pytest.raises(NotFound if damage == "vanish" else CorruptData):
        await get(store, digest)
    with pytest.raises(NotFound):
        await get(store, digest)
    await put(store, digest, data)
    assert await get(store, digest, 7) == data[7:]
