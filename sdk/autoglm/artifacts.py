"""Puts a model's files into a mesh's cache, so that workers and tokenizers can fetch them by one digest; and takes them
out again.

Talks to the cache's own address: no proxy lets anybody put artifacts. Files that are there already are not sent.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from autoglm import manifest
from autoglm.cache.v1 import cache_pb2, cache_pb2_grpc
from autoglm.errors import AutoglmError, InternalError, InvalidRequestError, UnavailableError
from autoglm.manifest import BadManifest, Manifest, ModelFile
from autoglm.statuses import error_of

PIECE_BYTES = 512 << 10
LEAST_BYTES_PER_S = 256 << 10
"""A file may take a minute, and longer by its size at this rate."""
LEFT_OUT = (".bin", ".ckpt", ".msgpack", ".pkl", ".pt", ".pth", ".h5", ".ot")
"""Weights in formats that nothing here reads."""


@dataclass(frozen=True, slots=True)
class Local:
    """What of a path makes the model, and what does not."""

    files: tuple[Path, ...]
    left_out: tuple[Path, ...]

    @property
    def total_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)


def look(place: Path) -> Local:
    """The files of a model directory, or a single file. Raises InvalidRequestError."""
    if place.is_file():
        return Local((place,), ())
    if not place.is_dir():
        raise InvalidRequestError(f"{place}: there is no such file or directory")
    taken, left = [], []
    for path in sorted(place.iterdir()):
        if path.is_file() and not path.name.startswith(".") and path.suffix not in LEFT_OUT:
            taken.append(path)
        else:
            left.append(path)
    if not taken:
        raise InvalidRequestError(f"{place}: no files of a model in it")
    return Local(tuple(taken), tuple(left))


def describe(files: Sequence[Path], progress: Callable[[int], None]) -> Manifest:
    """Hashes the files; `progress` hears of every piece's bytes. Raises InvalidRequestError."""
    found = []
    for path in files:
        hasher, size = hashlib.sha256(), 0
        for piece in _pieces(path):
            hasher.update(piece)
            size += len(piece)
            progress(len(piece))
        found.append(ModelFile(path.name, size, f"sha256:{hasher.hexdigest()}"))
    try:
        return manifest.make(found)
    except BadManifest as error:
        raise InvalidRequestError(str(error)) from None


class ArtifactClient:
    """A connection to one cache. `with ArtifactClient(address) as cache: cache.put_file(…)`."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._channel = grpc.insecure_channel(
            address, options=[("grpc.keepalive_time_ms", 30_000), ("grpc.enable_http_proxy", 0)]
        )
        self._stub = cache_pb2_grpc.CacheServiceStub(self._channel)

    def __enter__(self) -> ArtifactClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def put_file(self, path: Path, file: ModelFile, progress: Callable[[int], None]) -> bool:
        """Sends a file; False when the cache had it. Raises AutoglmError."""
        return self._put(file.digest, file.size, _pieces(path), progress)

    def put_manifest(self, made: Manifest) -> bool:
        """Sends the list of files, last: who finds it finds the files. Raises AutoglmError."""
        data = made.encoded()
        return self._put(made.digest, len(data), _cut(data), lambda _: None)

    def get_manifest(self, digest: str) -> Manifest:
        """The files of a model. Raises AutoglmError."""
        data = bytearray()
        for piece in self._get(digest, manifest.MAX_MANIFEST_BYTES):
            data += piece
        try:
            return manifest.parse(bytes(data), digest)
        except BadManifest as error:
            raise InvalidRequestError(str(error)) from None

    def get_file(self, file: ModelFile, directory: Path, progress: Callable[[int], None]) -> None:
        """Fetches a file into a directory, under its name only when it is proved. Raises AutoglmError."""
        place, hasher = directory / file.name, hashlib.sha256()
        part = place.with_name(f".{file.name}.part")
        try:
            with part.open("wb") as out:
                for piece in self._get(file.digest, file.size):
                    out.write(piece)
                    hasher.update(piece)
                    progress(len(piece))
            if f"sha256:{hasher.hexdigest()}" != file.digest:
                raise InternalError(f"what {self._address} sent of {file.name} is not {file.digest}")
            part.replace(place)
        except OSError as error:
            raise InvalidRequestError(f"{place}: {error.strerror or error}") from None
        finally:
            part.unlink(missing_ok=True)

    def _get(self, digest: str, limit: int) -> Iterator[bytes]:
        timeout_s, got = 60 + limit / LEAST_BYTES_PER_S, 0
        try:
            for answer in self._stub.GetArtifact(cache_pb2.GetArtifactRequest(digest=digest), timeout=timeout_s):
                got += len(answer.content)
                if max(got, answer.total_bytes) > limit:
                    raise InvalidRequestError(f"{digest} has {answer.total_bytes} bytes, at most {limit} were expected")
                yield answer.content
        except grpc.RpcError as error:
            raise self._failure(error, timeout_s) from None

    def _put(self, digest: str, size: int, pieces: Iterator[bytes], progress: Callable[[int], None]) -> bool:
        sent = 0

        def requests() -> Iterator[cache_pb2.PutArtifactRequest]:
            nonlocal sent
            yield cache_pb2.PutArtifactRequest(digest=digest)
            for piece in pieces:
                yield cache_pb2.PutArtifactRequest(content=piece)
                sent += len(piece)
                progress(len(piece))

        timeout_s = 60 + size / LEAST_BYTES_PER_S
        try:
            answer = self._stub.PutArtifact(requests(), timeout=timeout_s)
        except grpc.RpcError as error:
            raise self._failure(error, timeout_s) from None
        progress(size - sent)
        return not answer.present

    def _failure(self, error: grpc.RpcError, timeout_s: float) -> AutoglmError:
        found = error_of(error, self._address, timeout_s)  # type: ignore[arg-type]  # a call that has ended
        if isinstance(found, UnavailableError) and found.reason is None:
            return UnavailableError(f"no cache answers at {self._address}: {error.details()}", code=found.code)
        return found


def _pieces(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise InvalidRequestError(f"{path}: not a file")
            while piece := file.read(PIECE_BYTES):
                yield piece
    except OSError as error:
        raise InvalidRequestError(f"{path}: {error.strerror or error}") from None


def _cut(data: bytes) -> Iterator[bytes]:
    for start in range(0, len(data), PIECE_BYTES):
        yield data[start : start + PIECE_BYTES]
