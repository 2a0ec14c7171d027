"""Remembered digests: right whatever happens to the file or to the memory of it."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from engine.checkpoints.digest_cache import DigestCache, default_cache_directory

OLD_NS = time.time_ns() - 60_000_000_000


@pytest.fixture
def cache(tmp_path: Path) -> DigestCache:
    return DigestCache(tmp_path / "cache" / "digests")


def aged(path: Path, content: bytes, age_ns: int = 0) -> Path:
    """A file that nobody wrote to for a minute, and some more."""
    path.write_bytes(content)
    os.utime(path, ns=(OLD_NS - age_ns, OLD_NS - age_ns))
    return path


def entries(cache: DigestCache) -> list[Path]:
    assert cache.directory is not None
    return list(cache.directory.glob("*")) if cache.directory.exists() else []


def sha256(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def test_an_unchanged_file_is_hashed_once(tmp_path: Path, cache: DigestCache) -> None:
    """Same size and time: the remembered digest counts, even over other bytes, which shows that nothing was read."""
    path = aged(tmp_path / "weights", b"one")
    assert cache.file_digest(path) == sha256(b"one")
    aged(path, b"two")
    assert cache.file_digest(path) == sha256(b"one")
    assert DigestCache().file_digest(path) == sha256(b"two")


@pytest.mark.parametrize("change", ["size", "time", "inode", "path"])
def test_a_changed_file_is_hashed_again(tmp_path: Path, cache: DigestCache, change: str) -> None:
    """Any difference that a file system shows is a difference."""
    path = aged(tmp_path / "weights", b"one")
    cache.file_digest(path)
    if change == "size":
        aged(path, b"three")
    elif change == "time":
        aged(path, b"two", age_ns=1)
    elif change == "inode":
        aged(tmp_path / "new", b"two").rename(path)
    else:
        path = aged(tmp_path / "other", b"two")
    assert cache.file_digest(path) == sha256(path.read_bytes()) != sha256(b"one")


def test_a_file_just_written_is_not_remembered(tmp_path: Path, cache: DigestCache) -> None:
    """Another write within the clock's grain would not show."""
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    assert cache.file_digest(path) == sha256(b"one") and entries(cache) == []


@pytest.mark.parametrize(
    "content", [b"", b"\xff", b"{}", b"[" * 5000, b'{"file": 1, "digest": "sha256:00"}', b"x" * 10_000], ids=len
)
def test_a_corrupted_memory_is_ignored(tmp_path: Path, cache: DigestCache, content: bytes) -> None:
    """Whatever is found instead of an entry, the file is hashed, and the entry is good again."""
    path = aged(tmp_path / "weights", b"one")
    cache.file_digest(path)
    (entry,) = entries(cache)
    good = entry.read_bytes()
    entry.write_bytes(content)
    assert cache.file_digest(path) == sha256(b"one") and entry.read_bytes() == good
    entry.write_bytes(good.replace(b"sha256:", b"sha256:zz"))
    assert cache.file_digest(path) == sha256(b"one")


def test_only_so_many_are_remembered(tmp_path: Path) -> None:
    """The oldest entries go."""
    cache = DigestCache(tmp_path / "digests", max_entries=3)
    for number in range(6):
        cache.file_digest(aged(tmp_path / f"weights-{number}", b"one"))
    assert len(entries(cache)) == 3


def test_a_place_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path) -> None:
    """A file where the directory should be: digests are computed and not remembered."""
    (tmp_path / "cache").write_bytes(b"")
    path = aged(tmp_path / "weights", b"one")
    assert DigestCache(tmp_path / "cache" / "digests").file_digest(path) == sha256(b"one")
    assert DigestCache(None).file_digest(path) == sha256(b"one")


def test_several_files_have_one_digest(tmp_path: Path, cache: DigestCache) -> None:
    """It depends on names and contents, not on the order they are given in; a single file's is its own."""
    one, two = aged(tmp_path / "a", b"one"), aged(tmp_path / "b", b"two")
    assert cache.files_digest([one]) == sha256(b"one")
    both = cache.files_digest([one, two])
    assert cache.files_digest([two, one]) == both
    two.rename(tmp_path / "c")
    assert cache.files_digest([one, tmp_path / "c"]) != both


def test_the_place_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """AUTOGLM_CACHE_DIR, else the user's caches."""
    monkeypatch.setenv("AUTOGLM_CACHE_DIR", "/somewhere")
    assert default_cache_directory() == Path("/somewhere")
    monkeypatch.delenv("AUTOGLM_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert default_cache_directory() == Path("/caches/autoglm")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_directory() == Path.home() / ".cache" / "autoglm"
