"""Reads one safetensors file: a header in JSON, then the tensors' bytes.

Why not the `safetensors` package: it maps the file into memory. Mapped weights count as the worker's resident memory
while they are packed, and a file that is cut short meanwhile ends the process with a bus error instead of an exception.
Here only what is asked for is read, in pieces, and everything that is wrong is a `CheckpointError`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.checkpoints.architecture import CheckpointError
from engine.checkpoints.files import open_regular
from engine.checkpoints.json_files import parse_object

F32 = npt.NDArray[np.float32]

MAX_HEADER_BYTES = 4 << 20
MAX_TENSORS = 10_000
MAX_DIMENSIONS = 8
PIECE_ELEMENTS = 1 << 22
"""Read at once: bounds what a large tensor takes beside its result."""

DTYPES: Mapping[str, str] = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
"""Others are not weights as they stand (integers need their scales) or would lose bits on the way to float32."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Where one tensor lies: bytes `begin` to `end` of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """An open file whose header was checked. Reading is safe from several threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = open_regular(path)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no such file") from None
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror or error}") from None
        try:
            self.size = os.fstat(self._file.fileno()).st_size
            self.tensors = self._header()
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        self._file.close()

    def read(self, name: str, start: int, stop: int) -> F32:
        """Rows `start:stop` of a tensor in DTYPES, as float32. Raises CheckpointError for NaN and infinity too."""
        stored = self.tensors[name]
        row = math.prod(stored.shape[1:])
        out = np.empty((stop - start, *stored.shape[1:]), dtype=np.float32)
        flat = out.reshape(-1)
        kind = np.dtype(DTYPES[stored.dtype])
        position = stored.begin + start * row * kind.itemsize
        scratch = np.empty(min(PIECE_ELEMENTS, flat.size), dtype=kind)
        for first in range(0, flat.size, PIECE_ELEMENTS):
            piece = flat[first : first + PIECE_ELEMENTS]
            raw = scratch[: piece.size]
            self._fill(raw, position + first * kind.itemsize, name)
            if stored.dtype == "BF16":
                np.left_shift(raw, 16, out=piece.view(np.uint32), dtype=np.uint32)
            else:
                piece[:] = raw
            if not np.isfinite(piece).all():
                raise CheckpointError(f"{self.path}: {name} holds NaN or infinity")
        return out

    def _fill(self, array: npt.NDArray[Any], position: int, name: str) -> None:
        view = array.data.cast("B")
        done = 0
        try:
            while done < len(view):
                count = os.preadv(self._file.fileno(), [view[done:]], position + done)
                if count == 0:
                    raise CheckpointError(f"{self.path}: ends inside {name}: it was cut short while it was read")
                done += count
        except (OSError, ValueError) as error:  # ValueError: closed
            raise CheckpointError(f"{self.path}: {name} cannot be read ({error})") from None

    def _header(self) -> dict[str, Stored]:
        length = int.from_bytes(self._bytes(8, 0), "little")
        if length > MAX_HEADER_BYTES:
            raise self._broken(f"its header has {length} bytes, at most {MAX_HEADER_BYTES} are read")
        raw = parse_object(self._bytes(length, 8), self.path)
        raw.pop("__metadata__", None)
        if len(raw) > MAX_TENSORS:
            raise self._broken(f"{len(raw)} tensors, at most {MAX_TENSORS} are read")
        tensors = {name: self._stored(name, entry, 8 + length) for name, entry in raw.items()}
        position = 8 + length
        for name, stored in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
            if stored.begin != position:
                raise self._broken(f"{name[:100]} starts at byte {stored.begin}, the tensor before ends at {position}")
            position = stored.end
        if position != self.size:
            raise self._broken(f"the file has {self.size} bytes, its header promises {position}")
        return tensors

    def _bytes(self, count: int, position: int) -> bytes:
        if position + count > self.size:
            raise self._broken(f"{self.size} bytes are too few for its header")
        array = np.empty(count, dtype=np.uint8)
        self._fill(array, position, "the header")
        return array.tobytes()

    def _stored(self, name: str, entry: Any, base: int) -> Stored:
        def is_size(value: Any) -> bool:
            return type(value) is int and 0 <= value <= self.size

        label = name[:100]
        if not isinstance(entry, dict):
            raise self._broken(f"{label} has no description")
        dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
        if not isinstance(dtype, str) or len(dtype) > 32:
            raise self._broken(f"{label} has no dtype")
        if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(is_size, shape)):
            raise self._broken(f"{label} has the shape {repr(shape)[:100]}")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_size, offsets)):
            raise self._broken(f"{label} has the offsets {repr(offsets)[:100]}; the file has {self.size} bytes")
        begin, end = base + offsets[0], base + offsets[1]
        if begin > end or end > self.size:
            raise self._broken(f"{label} lies at bytes {begin} to {end}; the file has {self.size}")
        if dtype in DTYPES and end - begin != math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize:
            raise self._broken(f"{label}, {dtype} of shape {tuple(shape)}, cannot have {end - begin} bytes")
        return Stored(dtype, tuple(shape), begin, end)

    def _broken(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: not a readable safetensors file: {what}")
