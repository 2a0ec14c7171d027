"""Digests of large files, remembered: hashing gigabytes takes seconds at every start.

A file counts as the same while its path, device, inode, size and time of modification are. What is remembered is one
small file per digest below a directory; anything unreadable there is ignored and computed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.checkpoints.errors import CheckpointError
from engine.checkpoints.files import open_regular, read_bounded

CHUNK = 1 << 20
MAX_ENTRY_BYTES = 8192
SETTLED_NS = 2_000_000_000
"""A file written to so recently may be written to again without another time of modification: not remembered."""

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class DigestCache:
    """`directory` None remembers nothing. Of more than `max_entries` digests the oldest are forgotten. `progress` is
    told, while a file is hashed, how many of its bytes have been and how many it has.
    """

    directory: Path | None = None
    max_entries: int = 256
    progress: Callable[[int, int], None] | None = None

    def file_digest(self, path: Path) -> str:
        """`sha256:` and 64 hexadecimal digits over the file's bytes. Raises OSError."""
        with open_regular(path) as file:
            status = os.fstat(file.fileno())
            key = json.dumps([os.path.abspath(path), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns])
            if (known := self._recall(key)) is not None:
                return known
            hasher = hashlib.sha256()
            while piece := file.read(CHUNK):
                hasher.update(piece)
                if self.progress is not None:
                    self.progress(file.tell(), status.st_size)
            digest = f"sha256:{hasher.hexdigest()}"
            after = os.fstat(file.fileno())
        is_settled = time.time_ns() - after.st_mtime_ns > SETTLED_NS
        if is_settled and (after.st_size, after.st_mtime_ns) == (status.st_size, status.st_mtime_ns):
            self._remember(key, digest)
        return digest

    def files_digest(self, paths: Sequence[Path]) -> str:
        """One file's digest as it is; several files' over their names and digests, in the order of their names."""
        if len(paths) == 1:
            return self.file_digest(paths[0])
        hasher = hashlib.sha256(b"autoglm-weight-files-1\0")
        for path in sorted(paths, key=lambda path: path.name):
            hasher.update(path.name.encode() + b"\0" + self.file_digest(path).encode() + b"\0")
        return f"sha256:{hasher.hexdigest()}"

    def _entry(self, key: str) -> Path | None:
        return self.directory and self.directory / f"{hashlib.sha256(key.encode()).hexdigest()}.json"

    def _recall(self, key: str) -> str | None:
        if (entry := self._entry(key)) is None:
            return None
        try:
            stored = json.loads(read_bounded(entry, MAX_ENTRY_BYTES))
        except (OSError, ValueError, RecursionError):
            return None
        if not isinstance(stored, dict) or stored.get("file") != key:
            return None
        digest = stored.get("digest")
        return digest if isinstance(digest, str) and _DIGEST.fullmatch(digest) else None

    def _remember(self, key: str, digest: str) -> None:
        entry = self._entry(key)
        if entry is None:
            return
        with contextlib.suppress(OSError):  # a full or read-only disk costs time at the next start, nothing else
            entry.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=entry.parent, prefix=".new-")
            try:
                with open(descriptor, "w") as file:
                    json.dump({"file": key, "digest": digest}, file)
                os.replace(name, entry)
            except BaseException:
                os.unlink(name)
                raise
            self._forget_oldest(entry.parent)

    def _forget_oldest(self, directory: Path) -> None:
        entries = sorted(directory.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        for path in entries[: max(0, len(entries) - self.max_entries)]:
            path.unlink(missing_ok=True)


class WeightsDigest:
    """A checkpoint's `weight_files_digest`: found when first asked for, then the same as long as it is open."""

    def __init__(self, digests: DigestCache, paths: Sequence[Path]) -> None:
        self._digests, self._paths = digests, paths
        self._found: str | None = None

    def __call__(self) -> str:
        """Raises CheckpointError."""
        if self._found is None:
            try:
                self._found = self._digests.files_digest(self._paths)
            except OSError as error:
                raise CheckpointError(f"{error.filename or self._paths[0]}: {error.strerror or error}") from None
        return self._found


def default_cache_directory() -> Path:
    """`$AUTOGLM_CACHE_DIR`, or `autoglm` below the user's cache directory. Digests go into `digests` below it."""
    if given := os.environ.get("AUTOGLM_CACHE_DIR"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "autoglm"
