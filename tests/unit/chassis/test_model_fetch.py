"""A model by digest becomes a directory: whole or not at all, whatever the cache and the disk do on the way."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import random
import shutil
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
from autoglm.manifest import Manifest, ModelFile, make

from services.chassis import model_fetch
from services.chassis.errors import CorruptData, NotFound, ServiceError, Unavailable
from services.chassis.model_fetch import CannotFetch, Terms, fetch

PIECE = 1000
TERMS = Terms(patience_s=5.0, max_bytes=1 << 20)


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def model(**files: bytes) -> tuple[Manifest, dict[str, bytes]]:
    """A manifest, and everything a cache must hold for it. `__` in a name is a dot."""
    named = {name.replace("__", "."): data for name, data in files.items()}
    made = make([ModelFile(name, len(data), digest_of(data)) for name, data in named.items()])
    return made, {made.digest: made.encoded(), **{digest_of(data): data for data in named.values()}}


WEIGHTS = random.Random(1).randbytes(5 * PIECE + 7)
MADE, STORED = model(config__json=b"{}", model__safetensors=WEIGHTS, empty__txt=b"")


class Cache:
    """Artifacts from memory. `failures` are raised one per call, each after so many pieces of it."""

    def __init__(self, stored: dict[str, bytes], *failures: tuple[int, ServiceError]) -> None:
        self.stored, self.failures = stored, list(failures)
        self.asked: list[tuple[str, int]] = []

    async def artifact(self, digest: str, offset: int) -> AsyncGenerator[tuple[bytes, int], None]:
        self.asked.append((digest, offset))
        after, failure = self.failures.pop(0) if self.failures else (0, None)
        data = self.stored.get(digest)
        if data is None:
            raise NotFound(f"no artifact {digest} is stored")
        for number, start in enumerate(range(offset, max(len(data), offset + 1), PIECE)):
            if failure is not None and number == after:
                raise failure
            yield data[start : start + PIECE], len(data)


class Told:
    """What progress was reported."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def __call__(self, done: int, total: int) -> None:
        self.seen.append((done, total))


def content(place: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in place.iterdir()}


async def test_all_files_arrive_and_a_second_start_asks_nobody(tmp_path: Path) -> None:
    """The directory has exactly the files; progress ends at the whole; the next start needs no cache."""
    cache, told = Cache(STORED), Told()
    place = await fetch(MADE.digest, tmp_path, cache, TERMS, told)
    assert content(place) == {"config.json": b"{}", "model.safetensors": WEIGHTS, "empty.txt": b""}
    assert told.seen[-1] == (MADE.total_bytes, MADE.total_bytes)
    nobody = Cache({})
    assert await fetch(MADE.digest, tmp_path, nobody, TERMS, told) == place and nobody.asked == []


async def test_a_broken_transfer_is_gone_on_with(tmp_path: Path) -> None:
    """Unavailable in the middle of the weights: the next call asks from where the last ended."""
    failure = Unavailable("gone")
    cache = Cache(STORED, (9, failure), (9, failure), (3, failure))
    place = await fetch(MADE.digest, tmp_path, cache, TERMS, Told())
    assert (digest_of(WEIGHTS), 3 * PIECE) in cache.asked and content(place)["model.safetensors"] == WEIGHTS


async def test_a_broken_start_is_gone_on_with(tmp_path: Path) -> None:
    """A killed process leaves parts; the next one asks for the rest only, and damaged parts are fetched again."""
    part = tmp_path / "models" / f"{MADE.digest[7:]}.part"
    part.mkdir(parents=True)
    (part / "model.safetensors").write_bytes(WEIGHTS[: 2 * PIECE])
    (part / "config.json").write_bytes(b"[]")
    (part / "stranger").write_bytes(b"?")
    cache = Cache(STORED)
    place = await fetch(MADE.digest, tmp_path, cache, TERMS, Told())
    assert content(place).keys() == {"config.json", "model.safetensors", "empty.txt"}
    assert content(place)["config.json"] == b"{}"
    assert (digest_of(WEIGHTS), 2 * PIECE) in cache.asked and (digest_of(WEIGHTS), 0) not in cache.asked


async def test_a_missing_digest_names_itself_and_the_remedy(tmp_path: Path) -> None:
    """The list or one file is unknown to the cache: final, at once, with what to do."""
    for stored in ({}, {MADE.digest: MADE.encoded(), digest_of(b"{}"): b"{}", digest_of(b""): b""}):
        with pytest.raises(CannotFetch, match="autoglm model push") as caught:
            await fetch(MADE.digest, tmp_path, Cache(stored), TERMS, Told())
        assert caught.value.is_final and MADE.digest in str(caught.value)
    assert not (tmp_path / "models" / MADE.digest[7:]).exists()


async def test_damage_is_tried_once_more_and_then_said(tmp_path: Path) -> None:
    """A wrong byte or a cache that calls its own copy damaged: one more try, then a final error and no directory."""
    wrong = {**STORED, digest_of(WEIGHTS): WEIGHTS[:-1] + b"!"}
    cache = Cache(wrong)
    with pytest.raises(CannotFetch, match="what came is not"):
        await fetch(MADE.digest, tmp_path, cache, TERMS, Told())
    assert cache.asked.count((digest_of(WEIGHTS), 0)) == 2
    assert not (tmp_path / "models" / MADE.digest[7:]).exists()
    mended = Cache(STORED, (0, CorruptData("dropped")))
    assert (await fetch(MADE.digest, tmp_path, mended, TERMS, Told())).is_dir()


async def test_an_unreachable_cache_is_given_up_after_the_patience(tmp_path: Path) -> None:
    """Tried again until then; the error is not final, as another start may find the cache."""
    failures = [(0, Unavailable("connection refused"))] * 1000
    cache = Cache(STORED, *failures)
    with pytest.raises(CannotFetch, match="AUTOGLM_MODEL_FETCH_PATIENCE_S") as caught:
        await fetch(MADE.digest, tmp_path, cache, Terms(0.3, 1 << 20), Told())
    assert not caught.value.is_final and len(cache.asked) > 1


async def test_a_cache_that_hangs_is_given_up_too(tmp_path: Path) -> None:
    """Nothing comes and nothing fails: after the patience it is as if nobody were there."""

    class Hung(Cache):
        async def artifact(self, digest: str, offset: int) -> AsyncGenerator[tuple[bytes, int], None]:
            await asyncio.Event().wait()
            yield b"", 0

    with pytest.raises(CannotFetch, match="nothing came from the cache") as caught:
        await fetch(MADE.digest, tmp_path, Hung(STORED), Terms(0.2, 1 << 20), Told())
    assert not caught.value.is_final


async def test_bounds_are_kept(tmp_path: Path) -> None:
    """A model or list that is too large, and a digest that is none, are refused before a file is asked for."""
    cache = Cache(STORED)
    with pytest.raises(CannotFetch, match="AUTOGLM_MODEL_FETCH_MIB"):
        await fetch(MADE.digest, tmp_path, cache, Terms(5.0, 100), Told())
    assert len(cache.asked) == 1
    huge = bytes(3 << 20)
    with pytest.raises(CannotFetch, match="not a model's list"):
        await fetch(digest_of(huge), tmp_path, Cache({digest_of(huge): huge}), TERMS, Told())
    with pytest.raises(CannotFetch, match="hexadecimal"):
        await fetch("sha256:../../etc", tmp_path, cache, TERMS, Told())


async def test_too_little_disk_is_said_before_it_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing, where, and which setting moves it."""
    full = shutil._ntuple_diskusage(1 << 20, 1 << 20, 100)  # type: ignore[attr-defined]  # the type that disk_usage returns
    monkeypatch.setattr(model_fetch.shutil, "disk_usage", lambda _: full)  # type: ignore[attr-defined]  # imported there
    with pytest.raises(CannotFetch, match="AUTOGLM_CACHE_DIR"):
        await fetch(MADE.digest, tmp_path, Cache(STORED), TERMS, Told())


async def test_a_disk_that_fills_up_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC on the way is the same story, not a traceback."""

    def settle(part: Path, place: Path) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(model_fetch, "_settle", settle)
    with pytest.raises(CannotFetch, match="is full"):
        await fetch(MADE.digest, tmp_path, Cache(STORED), TERMS, Told())


async def test_what_somebody_has_changed_is_mended(tmp_path: Path) -> None:
    """A file cut short in the finished directory is fetched again; the others are only proved."""
    place = await fetch(MADE.digest, tmp_path, Cache(STORED), TERMS, Told())
    os.truncate(place / "model.safetensors", 3)
    cache = Cache(STORED)
    assert content(await fetch(MADE.digest, tmp_path, cache, TERMS, Told()))["model.safetensors"] == WEIGHTS
    assert {digest for digest, _ in cache.asked} == {digest_of(WEIGHTS)}


async def test_a_part_of_a_model_has_a_directory_of_its_own(tmp_path: Path) -> None:
    """Who wants no weights gets none, and does not hide them from who does."""
    text = Terms(5.0, 1 << 20, lambda name: not name.endswith(".safetensors"), ".text")
    place = await fetch(MADE.digest, tmp_path, Cache(STORED), text, Told())
    assert content(place).keys() == {"config.json", "empty.txt"} and place.name.endswith(".text")
    whole = await fetch(MADE.digest, tmp_path, Cache(STORED), TERMS, Told())
    assert "model.safetensors" in content(whole)


async def test_a_model_of_one_file_is_that_file(tmp_path: Path) -> None:
    """A .gguf alone is named by its path, as everybody names it."""
    made, stored = model(tiny__gguf=b"GGUF")
    place = await fetch(made.digest, tmp_path, Cache(stored), TERMS, Told())
    assert place.name == "tiny.gguf" and place.read_bytes() == b"GGUF"


async def test_two_at_once_fetch_once(tmp_path: Path) -> None:
    """Replicas on one machine share a directory: while one is at it the other waits and says so."""
    (tmp_path / "models").mkdir()
    other = os.open(tmp_path / "models" / f"{MADE.digest[7:]}.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(other, fcntl.LOCK_EX)
    seen: list[tuple[int, int]] = []

    def told(done: int, total: int) -> None:
        if not seen:
            os.close(other)  # the other has ended
        seen.append((done, total))

    assert (await fetch(MADE.digest, tmp_path, Cache(STORED), TERMS, told)).is_dir()
    assert seen[0] == (0, 0)
