"""Blocks as files: `blocks/<xx>/<yy>/<scope>-<hash>.<generation>.kv`, written beside and renamed into place.

Only blocking functions; the disk tier runs them in threads. Blocks are not fsynced: after a power cut some are torn or
missing, the header digest and checksum show it, and a cache may forget. Rename keeps a reader from half a file while
the machine is up.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from services.cache.blocks import HEADER_BYTES, BadBlock, BlockKey, Header, read_header
from services.cache.tiers import SCANNED_OUT

PAGE_BYTES = 4096
"""Files are charged in whole pages, as file systems do."""

_NAME = re.compile(r"([0-9a-f]{64})-([0-9a-f]{64})\.[0-9a-f]{16}\.kv")


class DirectoryInUse(RuntimeError):
    """Another cache owns the directory."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A block's file: where, and what it is charged."""

    path: Path
    charged_bytes: int


@dataclass(frozen=True, slots=True)
class Found:
    """A file that the scan takes over."""

    file: StoredFile
    header: Header
    written_ns: int


def charge(file_bytes: int) -> int:
    """Bytes rounded up to whole pages."""
    return -(-file_bytes // PAGE_BYTES) * PAGE_BYTES


def lock(root: Path) -> int:
    """Claims `root` for this process until the returned descriptor closes. Raises DirectoryInUse."""
    root.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise DirectoryInUse(f"{root} belongs to another cache that is running") from None
    return descriptor


def path_of(root: Path, key: BlockKey, generation: str) -> Path:
    """Where a block goes. `generation` (16 hexadecimal digits) makes a rewritten block another file."""
    name = key.block_hash.hex()
    return root / "blocks" / name[:2] / name[2:4] / f"{key.scope.hex()}-{name}.{generation}.kv"


def write(path: Path, temporary: Path, data: bytes) -> None:
    """Writes and renames; leaves nothing behind when it fails with OSError."""
    try:
        with temporary.open("wb") as file:
            file.write(data)
        try:
            temporary.rename(path)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.rename(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def read(path: Path, max_bytes: int) -> bytes:
    """The file's bytes, never more than `max_bytes` + 1."""
    with path.open("rb") as file:
        return file.read(max_bytes + 1)


def remove(path: Path) -> None:
    """Deletes a file that may be gone already."""
    path.unlink(missing_ok=True)


def clear_temporary(root: Path) -> Path:
    """An empty directory for files being written."""
    directory = root / "tmp"
    directory.mkdir(parents=True, exist_ok=True)
    for entry in os.scandir(directory):
        if entry.is_file(follow_symlinks=False):
            os.unlink(entry.path)
            SCANNED_OUT.labels("unfinished").inc()
    return directory


def scan(root: Path) -> list[Found]:
    """The blocks that are there, oldest first. Broken ones are deleted; files that are not ours are left alone."""
    found: dict[BlockKey, Found] = {}
    for path in _files(root / "blocks"):
        match = _NAME.fullmatch(path.name)
        if match is None:
            SCANNED_OUT.labels("foreign").inc()
            continue
        key = BlockKey(bytes.fromhex(match[1]), bytes.fromhex(match[2]))
        try:
            status = path.stat()
            with path.open("rb") as file:
                header = read_header(file.read(HEADER_BYTES))
            if header.key != key:
                raise BadBlock("another block")
            if header.payload_bytes != status.st_size - HEADER_BYTES:
                raise BadBlock("truncated payload")
            if key in found:
                raise BadBlock("twice")
        except (OSError, BadBlock) as error:
            SCANNED_OUT.labels(str(error) if isinstance(error, BadBlock) else "unreadable").inc()
            path.unlink(missing_ok=True)
            continue
        found[key] = Found(StoredFile(path, charge(status.st_size)), header, status.st_mtime_ns)
    return sorted(found.values(), key=lambda each: (each.written_ns, each.file.path.name))


def _files(directory: Path) -> Iterator[Path]:
    if not directory.is_dir():
        return
    for entry in sorted(os.scandir(directory), key=lambda each: each.name):
        if entry.is_dir(follow_symlinks=False):
            yield from _files(Path(entry.path))
        elif entry.is_file(follow_symlinks=False):
            yield Path(entry.path)
