"""Artifacts when callers misbehave or go away: the books stay right, and no byte lands in another file."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from services.cache import artifacts, files
from services.cache.artifacts import PIECE_BYTES, ArtifactStore
from services.chassis.errors import InvalidRequest
from services.chassis.offload import Offload

DIGEST = "sha256:" + "0" * 64


class GatedOffload(Offload):
    """Threads that stop before `slow` until the gate opens."""

    def __init__(self, slow: Callable[..., object]) -> None:
        super().__init__("test", 2, 8)
        self.slow = slow
        self.entered, self.gate = threading.Event(), threading.Event()

    async def __call__(self, work: Any, *args: Any, **kwargs: Any) -> Any:
        def gated() -> Any:
            if work is self.slow:
                self.entered.set()
                assert self.gate.wait(20)
            return work(*args, **kwargs)

        return await super().__call__(gated)


async def opened(root: Path, offload: Offload) -> ArtifactStore:
    files.clear_temporary(root)
    store = ArtifactStore(root, 4 * PIECE_BYTES, 2 * PIECE_BYTES, offload)
    await store.open()
    return store


def open_files() -> list[str]:
    return [os.path.realpath(f"/proc/self/fd/{each}") for each in os.listdir("/proc/self/fd")]


async def test_uploads_that_are_too_large_take_no_room_from_the_bound(tmp_path: Path) -> None:
    """However often one is refused, the store counts exactly what is there."""
    offload = Offload("test", 2, 8)
    store = await opened(tmp_path, offload)
    for _ in range(5):
        with pytest.raises(InvalidRequest, match="larger"):
            async with store.begin(DIGEST) as upload:
                for _ in range(3):
                    await upload.write(bytes(PIECE_BYTES))
        assert store.occupancy().used_bytes == 0
    offload.close()


async def test_a_cancelled_write_never_reaches_another_file(tmp_path: Path) -> None:
    """A thread that is about to write when its caller goes away keeps its descriptor to itself."""
    offload = GatedOffload(artifacts._append)
    store = await opened(tmp_path, offload)

    async def send() -> None:
        async with store.begin(DIGEST) as upload:
            await upload.write(b"poison")

    sender = asyncio.create_task(send())
    assert await asyncio.to_thread(offload.entered.wait, 20)
    sender.cancel()
    for _ in range(5):  # all that a cancelled task does before it waits for a thread
        await asyncio.sleep(0)
    other = os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT)
    offload.gate.set()
    with contextlib.suppress(asyncio.CancelledError):
        await sender
    await offload(int)
    offload.close()
    offload._pool.shutdown(wait=True)
    assert os.pread(other, 10, 0) == b""
    os.close(other)
    assert list((tmp_path / "tmp").iterdir()) == [] and store.occupancy().used_bytes == 0


async def test_a_cancelled_start_leaves_no_descriptor_and_no_file(tmp_path: Path) -> None:
    """A caller that goes away while its file is being created leaks nothing."""
    offload = GatedOffload(os.open)
    store = await opened(tmp_path, offload)
    starter = asyncio.create_task(store.begin(DIGEST).__aenter__())
    assert await asyncio.to_thread(offload.entered.wait, 20)
    starter.cancel()
    for _ in range(5):
        await asyncio.sleep(0)
    offload.gate.set()
    with contextlib.suppress(asyncio.CancelledError):
        await starter
    offload.close()
    offload._pool.shutdown(wait=True)
    assert not [path for path in open_files() if str(tmp_path) in path]
    assert list((tmp_path / "tmp").iterdir()) == []
