"""A model by digest becomes a directory: the list of files, then each file, from the mesh's cache, proved and kept.

Called at start by programs that need a model's files and were told `sha256:…` instead of a path. Files arrive in
`models/<digest>.part` and are moved to `models/<digest>` in one step when all are whole; what a broken start has left
there is gone on with. A later start uses what is there and asks nobody. Knows nothing of what the files mean.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from autoglm.manifest import MAX_MANIFEST_BYTES, BadManifest, Manifest, ModelFile, hexadecimal, parse

from services.chassis.errors import CorruptData, InvalidRequest, NotFound, OutOfTime, ServiceError

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 2.0
LOCK_POLL_S = 0.2
PUBLISH = "publish it with `autoglm model push` into this cache, or one that shares its object store"


class CannotFetch(Exception):
    """The model cannot be had; the text names digest and remedy. `is_final`: another start would fail the same."""

    def __init__(self, text: str, is_final: bool = True) -> None:
        super().__init__(text)
        self.is_final = is_final


class Artifacts(Protocol):
    """Where artifacts come from: the cache service."""

    def artifact(self, digest: str, offset: int) -> AsyncGenerator[tuple[bytes, int], None]:
        """Content from `offset` on in pieces, each with the size of the whole. Raises ServiceError."""
        ...


@dataclass(frozen=True, slots=True)
class Terms:
    """`patience_s` is how long nothing may arrive before it is given up; `max_bytes` bounds the model.

    `wants` chooses files by name; what it leaves out is not fetched, and the directory's name gets `suffix`.
    """

    patience_s: float
    max_bytes: int
    wants: Callable[[str], bool] = lambda _: True
    suffix: str = ""


async def fetch(
    digest: str, root: Path, artifacts: Artifacts, terms: Terms, progress: Callable[[int, int], None]
) -> Path:
    """The model's directory (its file, for a model that is one file) below `root`. Raises CannotFetch.

    `progress` is told bytes done and in all; 0 of 0 while waiting. One process at a time fetches a digest.
    """
    try:
        key = hexadecimal(digest) + terms.suffix
    except BadManifest as error:
        raise CannotFetch(f"{error}; `autoglm model push` prints one") from None
    try:
        return await _Fetch(digest, root / "models", key, artifacts, terms, progress).run()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CannotFetch(f"{digest}: the disk of {root} is full; free space, or set AUTOGLM_CACHE_DIR") from None
        raise CannotFetch(
            f"{digest}: {error.filename or root}: {error.strerror or error}; see AUTOGLM_CACHE_DIR"
        ) from None


class _Fetch:
    def __init__(
        self,
        digest: str,
        home: Path,
        key: str,
        artifacts: Artifacts,
        terms: Terms,
        progress: Callable[[int, int], None],
    ) -> None:
        self._digest, self._home, self._artifacts, self._terms = digest, home, artifacts, terms
        self._place, self._part = home / key, home / f"{key}.part"
        self._progress = progress
        self._done = self._total = 0
        self._heard = time.monotonic()

    async def run(self) -> Path:
        self._home.mkdir(mode=0o700, parents=True, exist_ok=True)
        async with self._alone():
            found = await self._manifest()
            files = [file for file in found.files if self._terms.wants(file.name)]
            self._total = sum(file.size for file in files)
            if self._total > self._terms.max_bytes:
                raise CannotFetch(
                    f"{self._digest} has {self._total} bytes, at most {self._terms.max_bytes} are fetched: "
                    f"AUTOGLM_MODEL_FETCH_MIB"
                )
            if not self._is_whole(files):
                await self._get(files)
        single = found.single_file
        return self._place / single if single is not None else self._place

    def _is_whole(self, files: list[ModelFile]) -> bool:
        """Whether all was proved before: sizes are looked at, as a reader of another's files would notice the rest."""
        with suppress(OSError):
            return self._place.is_dir() and all((self._place / file.name).stat().st_size == file.size for file in files)
        return False

    async def _manifest(self) -> Manifest:
        kept = self._home / f"{hexadecimal(self._digest)}.json"
        with suppress(OSError, BadManifest):
            if kept.stat().st_size <= MAX_MANIFEST_BYTES:
                return parse(kept.read_bytes(), self._digest)
        data = bytearray()

        async def receive() -> None:
            data.clear()
            async for content, total in self._pieces(self._digest, 0):
                if total > MAX_MANIFEST_BYTES:
                    raise CannotFetch(f"{self._digest} is {total} bytes of something, not a model's list of files")
                data.extend(content)

        await self._patiently(self._digest, receive)
        try:
            found = parse(bytes(data), self._digest)
        except BadManifest as error:
            raise CannotFetch(f"{error}; {PUBLISH}") from None
        fresh = kept.with_suffix(".new")
        fresh.write_bytes(data)
        fresh.replace(kept)
        return found

    async def _get(self, files: list[ModelFile]) -> None:
        if self._place.is_dir():  # somebody has changed it: what still proves itself is kept
            shutil.rmtree(self._part, ignore_errors=True)
            self._place.rename(self._part)
        self._part.mkdir(mode=0o700, exist_ok=True)
        wanted = {file.name for file in files}
        for path in self._part.iterdir():
            if path.name not in wanted or path.is_symlink() or not path.is_file():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        there = sum(path.stat().st_size for path in self._part.iterdir())
        free = shutil.disk_usage(self._part).free
        if self._total - there > free:
            raise CannotFetch(
                f"{self._digest} needs {self._total - there} bytes more below {self._home}, {free} are free; "
                f"free space, or set AUTOGLM_CACHE_DIR"
            )
        for file in files:
            await self._file(file)
        await asyncio.to_thread(_settle, self._part, self._place)

    async def _file(self, file: ModelFile) -> None:
        path, before = self._part / file.name, self._done

        async def receive() -> None:
            hasher = await asyncio.to_thread(_hash_so_far, path, file.size)
            position = path.stat().st_size if path.exists() else 0
            self._told(before + position)
            with path.open("ab") as out:
                while position < file.size:
                    begun = position
                    async for content, _ in self._pieces(file.digest, position):
                        if position + len(content) > file.size:
                            raise CorruptData(f"{file.digest} is longer than {file.size} bytes")
                        out.write(content)
                        hasher.update(content)
                        position += len(content)
                        self._told(before + position)
                    if position == begun:
                        break
            if position != file.size or hasher.hexdigest() != hexadecimal(file.digest):
                path.unlink()
                raise CorruptData(f"what came is not {file.digest}")

        await self._patiently(f"{file.digest} ({file.name} of {self._digest})", receive)

    async def _pieces(self, digest: str, offset: int) -> AsyncIterator[tuple[bytes, int]]:
        """What the cache sends; a cache that hangs is as good as none."""
        async with aclosing(self._artifacts.artifact(digest, offset)) as pieces:
            while True:
                try:
                    yield await asyncio.wait_for(anext(pieces), self._terms.patience_s)
                except StopAsyncIteration:
                    return
                except TimeoutError:
                    raise OutOfTime(f"{digest}: no answer") from None

    async def _patiently(self, what: str, receive: Callable[[], Awaitable[None]]) -> None:
        """Tries until it succeeds, or nothing has come for too long. After damage once more: it may have been ours."""
        pause_s, damages = FIRST_PAUSE_S, 0
        self._heard = time.monotonic()
        while True:
            heard = self._heard
            try:
                return await receive()
            except (NotFound, InvalidRequest) as error:
                raise CannotFetch(f"the cache cannot give {what}: {error.message}; {PUBLISH}") from None
            except CorruptData as error:
                damages += 1
                if damages > 1:
                    raise CannotFetch(f"the cache cannot give {what}: {error.message}; {PUBLISH}") from None
            except ServiceError as error:
                if time.monotonic() - self._heard >= self._terms.patience_s:
                    raise CannotFetch(
                        f"{what}: nothing came from the cache for {self._terms.patience_s:g} s ({error.message}); is "
                        f"it up, and may this service call it? AUTOGLM_MODEL_FETCH_PATIENCE_S says how long to wait",
                        is_final=False,
                    ) from None
            pause_s = FIRST_PAUSE_S if self._heard > heard else min(2 * pause_s, LONGEST_PAUSE_S)
            self._progress(self._done, self._total)
            await asyncio.sleep(pause_s)

    def _told(self, done: int) -> None:
        if done > self._done:
            self._heard = time.monotonic()
        self._done = done
        self._progress(done, self._total)

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        descriptor = os.open(
            self._place.with_name(f"{self._place.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    self._progress(0, 0)
                    await asyncio.sleep(LOCK_POLL_S)
            yield
        finally:
            os.close(descriptor)


def _hash_so_far(path: Path, size: int) -> hashlib._Hash:
    """What has come of a file, hashed; more than there should be is thrown away."""
    hasher = hashlib.sha256()
    with suppress(FileNotFoundError), path.open("rb") as file:
        if os.fstat(file.fileno()).st_size > size:
            path.unlink()
            return hasher
        while piece := file.read(1 << 20):
            hasher.update(piece)
    return hasher


def _settle(part: Path, place: Path) -> None:
    """Makes the whole directory durable, then visible under its name."""
    for path in (*part.iterdir(), part):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    part.rename(place)
