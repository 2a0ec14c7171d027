"""Packed weights on disk: written once from a checkpoint, then mapped by every worker that serves them.

The file is named by what it holds (weights, architecture, plan), so a stale one is never met; it is written aside and
renamed when whole. It lies in the user's own cache, yet its header is checked like any other file's.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import autoglm_kernels as kernels
import numpy as np
import numpy.typing as npt

from engine.checkpoints.architecture import F32, Architecture, Checkpoint, CheckpointError
from engine.precision.plan import Format, Plan

MAGIC = b"AUTOGLM-PACKED-1"
MAX_HEADER_BYTES = 16 << 20
ALIGNMENT = 64
WAIT_S = 0.1
"""Between two looks whether another process has finished packing."""
ROWS_AT_ONCE = 4 << 20
"""float32 weights in memory while packing, per thread."""

U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]
Progress = Callable[[int, int], None]
"""Told bytes written so far and in all."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the file: a packed matrix with its scales, or float32 numbers when `format` is None."""

    name: str
    format: Format | None
    rows: int
    columns: int
    offset: int
    data_bytes: int
    scale_bytes: int

    @property
    def end(self) -> int:
        return self.offset + _aligned(self.data_bytes) + _aligned(self.scale_bytes)


class PackedWeights:
    """An open file of packed weights, in memory that stays until the last array of it is gone."""

    def __init__(self, memory: U8, entries: dict[str, Entry]) -> None:
        self._memory, self._entries = memory, entries
        self.nbytes = memory.nbytes

    def matrix(self, name: str) -> kernels.PackedMatrix:
        """A packed matrix. Raises KeyError."""
        entry = self._entries[name]
        assert entry.format is not None
        data = self._memory[entry.offset : entry.offset + entry.data_bytes]
        start = entry.offset + _aligned(entry.data_bytes)
        scales = self._memory[start : start + entry.scale_bytes].view(np.uint16)
        form = entry.format
        return kernels.PackedMatrix(form.kind, form.layout, entry.rows, entry.columns, form.group, data, scales)

    def vector(self, name: str) -> F32 | None:
        """A float32 tensor, or None when the architecture has none of that name."""
        entry = self._entries.get(name)
        if entry is None:
            return None
        return self._memory[entry.offset : entry.offset + entry.data_bytes].view(np.float32)


def digest_of(checkpoint: Checkpoint, plan: Plan) -> str:
    """Names the packed weights: 64 hexadecimal digits over weights, architecture and plan."""
    hasher = hashlib.sha256()
    for part in (checkpoint.weight_files_digest, repr(checkpoint.architecture), plan.identity):
        hasher.update(len(part).to_bytes(8, "little") + part.encode())
    return hasher.hexdigest()


def pack_or_open(
    checkpoint: Checkpoint, plan: Plan, directory: Path, threads: int, progress: Progress, resident: bool = False
) -> PackedWeights:
    """The packed weights below `directory`, made first when they are not there. Raises CheckpointError.

    While another process packs the same weights, this one waits and tells `progress` 0 bytes of 0 now and then.
    `resident` copies them into huge pages of this process instead of mapping the file: quicker by the misses of the
    page tables that it saves, but not shared with other workers.
    """
    path = directory / f"{digest_of(checkpoint, plan)}.packed"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock"), progress):
            if not path.exists():
                _remove_unfinished(path)
                pack(checkpoint, plan, path, threads, progress)
        return open_packed(path, layout_of(checkpoint.architecture, plan), resident)
    except OSError as error:
        raise CheckpointError(f"{error.filename or path}: {error.strerror or error}") from None


def pack(checkpoint: Checkpoint, plan: Plan, path: Path, threads: int, progress: Progress) -> None:
    """Quantises every matrix into a new file at `path`. Raises CheckpointError or OSError; then no file is left."""
    entries = layout_of(checkpoint.architecture, plan)
    header = _header(entries)
    base = _base(header)
    total = base + max(entry.end for entry in entries)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=_unfinished(path))
    try:
        os.posix_fallocate(handle, 0, total)
        # Not closed by hand: an error's frames may still hold pieces of it, and closing would hide that error.
        memory = mmap.mmap(handle, total)
        memory[: len(header)] = header
        _fill(checkpoint, entries, np.frombuffer(memory, np.uint8)[base:], threads, progress)
        memory.flush()
        os.chmod(name, 0o644)
        os.rename(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    finally:
        os.close(handle)


def open_packed(path: Path, expected: list[Entry], resident: bool) -> PackedWeights:
    """Maps a file that `pack` wrote. Raises CheckpointError when it holds anything but `expected`, or OSError."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(len(MAGIC) + 8)
        length = int.from_bytes(head[len(MAGIC) :], "little")
        if head[: len(MAGIC)] != MAGIC or length > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path}: no packed weights; remove it, it will be made again")
        header = head + file.read(length)
        base = _base(header)
        if header != _header(expected) or size != base + max(entry.end for entry in expected):
            raise CheckpointError(f"{path}: holds other weights than its name says; remove it, it will be made again")
        if resident:
            memory = huge_memory(size - base)
            file.seek(base)
            if file.readinto(memory.data) != size - base:
                raise CheckpointError(f"{path}: ends too early")
        else:
            mapped = mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ)
            mapped.madvise(mmap.MADV_WILLNEED)
            memory = np.frombuffer(mapped, np.uint8)[base:]
    return PackedWeights(memory, {entry.name: entry for entry in expected})


def huge_memory(size: int) -> U8:
    """Zeroed memory in huge pages, where the system has them; freed with its last array."""
    page = 2 << 20
    memory = mmap.mmap(-1, size + page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, np.uint8)
    start = -whole.ctypes.data % page
    return whole[start : start + size]


def layout_of(arch: Architecture, plan: Plan) -> list[Entry]:
    """Every tensor of the file in its order: first the layers, then the head, for that is how a step reads them."""
    entries: list[Entry] = []
    end = 0
    for name, form, rows, columns in _tensors(arch, plan):
        if form is None:
            data, scales = columns * 4, 0
        else:
            data, scales = kernels.packed_bytes(form.kind, form.layout, rows, columns, form.group)
        entry = Entry(name, form, rows, columns, end, data, scales)
        entries.append(entry)
        end = entry.end
    return entries


def _tensors(arch: Architecture, plan: Plan) -> Iterator[tuple[str, Format | None, int, int]]:
    hidden, inner = arch.hidden_size, arch.intermediate_size
    query = arch.num_attention_heads * arch.head_dim
    qkv = sum(padded for _, _, padded in _qkv_parts(arch))
    for layer in range(arch.num_hidden_layers):
        base = f"{layer}."
        for name, size in (("input_norm", hidden), ("post_norm", hidden)):
            yield base + name, None, 1, size
        if arch.sandwich_norm:
            yield base + "post_attention_norm", None, 1, hidden
            yield base + "post_mlp_norm", None, 1, hidden
        if arch.qk_norm:
            yield base + "q_norm", None, 1, arch.head_dim
            yield base + "k_norm", None, 1, arch.head_dim
        if arch.qkv_bias:
            yield base + "qkv_bias", None, 1, qkv
        if arch.o_bias:
            yield base + "o_bias", None, 1, _pad16(hidden)
        yield base + "qkv", plan.of("qkv"), qkv, hidden
        yield base + "o", plan.of("o"), hidden, query
        yield base + "gate", plan.of("gate"), inner, hidden
        yield base + "up", plan.of("up"), inner, hidden
        yield base + "down", plan.of("down"), hidden, inner
    yield "norm", None, 1, hidden
    yield "head", plan.of("head"), arch.vocab_size, hidden
    if not shares_head(arch, plan):
        yield "embedding", plan.of("embedding"), arch.vocab_size, hidden


def shares_head(arch: Architecture, plan: Plan) -> bool:
    """Whether embedding rows are read from the packed head."""
    return arch.tie_word_embeddings and plan.of("head") == plan.of("embedding")


def _qkv_parts(arch: Architecture) -> tuple[tuple[str, int, int], ...]:
    """(name, rows, rows padded to a panel) of queries, keys and values."""
    query, key = arch.num_attention_heads * arch.head_dim, arch.num_key_value_heads * arch.head_dim
    return tuple((name, rows, _pad16(rows)) for name, rows in (("q", query), ("k", key), ("v", key)))


def _fill(checkpoint: Checkpoint, entries: list[Entry], memory: U8, threads: int, progress: Progress) -> None:
    total = max(entry.end for entry in entries)
    done = 0
    with ThreadPoolExecutor(threads) as pool:
        for entry in entries:
            if entry.format is None:
                memory[entry.offset : entry.offset + entry.data_bytes].view(np.float32)[:] = _vector(checkpoint, entry)
            else:
                _pack_matrix(checkpoint, entry, memory, pool, threads)
            done += entry.data_bytes + entry.scale_bytes
            progress(done, total)


def _pack_matrix(checkpoint: Checkpoint, entry: Entry, memory: U8, pool: ThreadPoolExecutor, threads: int) -> None:
    form = entry.format
    assert form is not None
    data = memory[entry.offset : entry.offset + entry.data_bytes]
    start = entry.offset + _aligned(entry.data_bytes)
    scales = memory[start : start + entry.scale_bytes].view(np.uint16)
    padded = kernels.padded_rows(form.kind, form.layout, entry.rows, entry.columns, form.group)

    def piece(source: str, layer: int | None, first: int, stop: int, at: int) -> None:
        rows = checkpoint.rows(source, first, stop, layer)
        kernels.pack_rows(form.kind, form.layout, entry.rows, form.group, rows, at, data, scales)

    def zeros(first: int, stop: int) -> None:
        blank = np.zeros((stop - first, entry.columns), np.float32)
        kernels.pack_rows(form.kind, form.layout, entry.rows, form.group, blank, first, data, scales)

    # Rows share bytes: of a panel's scales or of a nibble. Pieces are cut at multiples of 64 rows, so that threads that
    # pack different pieces never write into the same bytes; in columns they always would.
    step = max(64, ROWS_AT_ONCE // max(1, entry.columns) // 64 * 64)
    jobs: list[Callable[[], None]] = []
    apart = form.layout != "columns"
    at = 0
    for source, layer, rows, room in _sources(checkpoint.architecture, entry):
        apart = apart and at % 64 == 0
        for first in range(0, rows, step):
            jobs.append(partial(piece, source, layer, first, min(rows, first + step), at + first))
        if room > rows:
            jobs.append(partial(zeros, at + rows, at + room))
            apart = False
        at += room
    if padded > at:
        jobs.append(partial(zeros, at, padded))
        apart = apart and at % 64 == 0
    if not apart:  # neighbours would write into the same bytes
        for job in jobs:
            job()
        return
    for future in [pool.submit(job) for job in jobs]:
        future.result()


def _sources(arch: Architecture, entry: Entry) -> list[tuple[str, int | None, int, int]]:
    """(canonical tensor, layer, rows, rows with padding) whose rows follow each other in a packed matrix."""
    layer, _, name = entry.name.rpartition(".")
    number = int(layer) if layer else None
    if name == "qkv":
        return [(part, number, rows, padded) for part, rows, padded in _qkv_parts(arch)]
    source = "embedding" if name == "head" and arch.tie_word_embeddings else name
    return [(source, number, entry.rows, entry.rows)]


def _vector(checkpoint: Checkpoint, entry: Entry) -> F32:
    layer, _, name = entry.name.rpartition(".")
    number = int(layer) if layer else None
    out = np.zeros(entry.columns, np.float32)
    if name == "qkv_bias":
        at = 0
        for part, rows, padded in _qkv_parts(checkpoint.architecture):
            out[at : at + rows] = checkpoint.tensor(f"{part}_bias", number)
            at += padded
        return out
    values = checkpoint.tensor(name, number)
    out[: len(values)] = values
    return out


def _header(entries: list[Entry]) -> bytes:
    described = [
        [e.name, [e.format.kind, e.format.group, e.format.layout] if e.format else None, e.rows, e.columns, e.offset]
        for e in entries
    ]
    text = json.dumps(described, separators=(",", ":")).encode()
    return MAGIC + len(text).to_bytes(8, "little") + text


def _base(header: bytes) -> int:
    """Where the tensors begin: on a page of the file."""
    return -(-len(header) // mmap.PAGESIZE) * mmap.PAGESIZE


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _pad16(size: int) -> int:
    return -(-size // 16) * 16


def _unfinished(path: Path) -> str:
    """How names of files that are still being written begin."""
    return f".{path.stem}."


def _remove_unfinished(path: Path) -> None:
    """What a killed packer of the same weights left behind; to be called while the lock is held."""
    for left in path.parent.glob(f"{_unfinished(path)}*"):
        with contextlib.suppress(OSError):
            left.unlink()


@contextlib.contextmanager
def _locked(path: Path, waiting: Progress) -> Iterator[None]:
    """One worker packs, the others wait for it. The lock ends with its process."""
    with open(path, "wb") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting(0, 0)
                time.sleep(WAIT_S)
            else:
                break
        yield
