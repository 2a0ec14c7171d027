"""Reads the header of a GGUF file (versions 2 and 3): metadata and where the tensors lie. Standard library only.

The tokenizer service reads metadata with it, `gguf_reader` the weights. A header is data from a stranger: every count
and length is checked against a bound and against what is left of the file before anything is allocated, and a tensor
that lies outside the file, unaligned or on top of another is refused. The file is read, never mapped: one that is cut
short meanwhile is an exception, not a signal. The format: github.com/ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import math
import os
import struct
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn, TypeAlias

from engine.checkpoints.errors import CheckpointError
from engine.checkpoints.files import open_regular

MAX_HEADER_BYTES = 96 << 20
MAX_KEYS = 4096
MAX_KEY_BYTES = 1024
MAX_STRING_BYTES = 32 << 20
MAX_STRINGS = 1_000_000
"""Elements of all string arrays together: the largest vocabularies in use and their merges have 850,000."""
MAX_ARRAY_BYTES = 32 << 20
"""Of one array of numbers."""
MAX_TENSORS = 10_000
MAX_NAME_BYTES = 128
MAX_ELEMENTS = 1 << 40
"""Of one tensor."""
MAX_ALIGNMENT = 1 << 20
READ_BYTES = 1 << 20

Value: TypeAlias = "int | float | bool | bytes | array[int] | array[float] | list[bytes]"
"""Strings stay bytes until someone wants them."""

BLOCKS: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 8: ("Q8_0", 32, 34), 2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
}  # fmt: skip
"""ggml type → (name, elements per block, bytes per block): the types that can be read."""

_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS: Mapping[int, str] = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor: `shape` as in numpy (rows first), and bytes `begin` to `end` of the file."""

    kind: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a GGUF file says before its weights."""

    path: Path
    metadata: Mapping[str, Value]
    tensors: Mapping[str, Stored]
    size: int

    def text(self, key: str, default: str | None = None) -> str | None:
        """A string, or `default` when it is missing. Raises CheckpointError for another type or invalid UTF-8."""
        value = self.metadata.get(key)
        if value is None:
            return default
        if not isinstance(value, bytes):
            raise CheckpointError(f"{self.path}: {key} is no string")
        return self._decode(value, key)

    def texts(self, key: str) -> list[str] | None:
        """A list of strings, or None. Raises CheckpointError."""
        value = self.metadata.get(key)
        if value is None:
            return None
        if not isinstance(value, list):
            raise CheckpointError(f"{self.path}: {key} is no list of strings")
        return [self._decode(each, key) for each in value]

    def numbers(self, key: str) -> list[int] | list[float] | None:
        """A list of numbers, or None. Raises CheckpointError."""
        value = self.metadata.get(key)
        if value is None:
            return None
        if not isinstance(value, array):
            raise CheckpointError(f"{self.path}: {key} is no list of numbers")
        return value.tolist()

    def whole(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """An integer in [low, high]. Raises CheckpointError, also when it is missing and has no default."""
        value = self.metadata.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise CheckpointError(
                f"{self.path}: {key} is {_short(value)}; a whole number from {low} to {high} is needed"
            )
        return value

    def real(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """A finite number in [low, high]. Raises CheckpointError."""
        value = self.metadata.get(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
            raise CheckpointError(f"{self.path}: {key} is {_short(value)}; a number from {low} to {high} is needed")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """A boolean. Raises CheckpointError."""
        value = self.metadata.get(key, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.path}: {key} is {_short(value)}; a boolean is needed")
        return value

    def _decode(self, value: bytes, key: str) -> str:
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.path}: {key} holds invalid UTF-8") from None


def read_header(path: Path) -> Header:
    """Reads and checks the header. Raises CheckpointError."""
    file = open_gguf_file(path)
    with file:
        return parse_header(file, path)


def open_gguf_file(path: Path) -> BinaryIO:
    """Raises CheckpointError."""
    try:
        return open_regular(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None


def parse_header(file: BinaryIO, path: Path) -> Header:
    """The header of an open file. Raises CheckpointError."""
    cursor = _Cursor(file, path)
    if cursor.take(4) != b"GGUF":
        cursor.fail("not a GGUF file")
    (version,) = cursor.numbers("I", 1)
    if version not in (2, 3):
        cursor.fail(f"GGUF version {version}; versions 2 and 3 (little-endian) are read")
    tensor_count, key_count = cursor.numbers("Q", 2)
    if tensor_count > MAX_TENSORS or key_count > MAX_KEYS:
        cursor.fail(f"{tensor_count} tensors and {key_count} keys; at most {MAX_TENSORS} and {MAX_KEYS} are read")
    metadata: dict[str, Value] = {}
    for _ in range(key_count):
        key = cursor.name(MAX_KEY_BYTES)
        if key in metadata:
            cursor.fail(f"key {key[:100]!r} occurs twice")
        metadata[key] = cursor.value(key)
    entries: dict[str, tuple[int, tuple[int, ...], int]] = {}
    for _ in range(tensor_count):
        name = cursor.name(MAX_NAME_BYTES)
        if name in entries:
            cursor.fail(f"tensor {name!r} occurs twice")
        (count,) = cursor.numbers("I", 1)
        if not 1 <= count <= 4:
            cursor.fail(f"tensor {name!r} has {count} dimensions; 1 to 4 are read")
        sizes = tuple(reversed(cursor.numbers("Q", count)))
        (kind,) = cursor.numbers("I", 1)
        (offset,) = cursor.numbers("Q", 1)
        entries[name] = (kind, sizes, offset)
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        cursor.fail(f"general.alignment is {_short(alignment)}; a power of two up to {MAX_ALIGNMENT} is needed")
    base = -(-cursor.position // alignment) * alignment
    tensors = {name: _stored(cursor, name, *entry, base, alignment) for name, entry in entries.items()}
    _refuse_overlaps(cursor, tensors)
    return Header(path, metadata, tensors, cursor.size)


def _stored(
    cursor: _Cursor, name: str, kind: int, shape: tuple[int, ...], offset: int, base: int, alignment: int
) -> Stored:
    if kind not in BLOCKS:
        readable = ", ".join(entry[0] for entry in BLOCKS.values())
        cursor.fail(f"tensor {name!r} has ggml type {kind}; this reader takes {readable}")
    text, elements, size = BLOCKS[kind]
    total = math.prod(shape)
    if min(shape) < 1 or total > MAX_ELEMENTS:
        cursor.fail(f"tensor {name!r} has shape {shape}")
    if shape[-1] % elements:
        cursor.fail(f"tensor {name!r}: rows of {shape[-1]} are no multiple of a {text} block, {elements}")
    begin, end = base + offset, base + offset + total // elements * size
    if offset % alignment:
        cursor.fail(f"tensor {name!r} starts at offset {offset}, no multiple of {alignment}")
    if end > cursor.size:
        cursor.fail(f"tensor {name!r} ends at byte {end}, the file has {cursor.size}: it is cut short")
    return Stored(text, shape, begin, end)


def _refuse_overlaps(cursor: _Cursor, tensors: Mapping[str, Stored]) -> None:
    last, before = 0, ""
    for name, stored in sorted(tensors.items(), key=lambda item: item[1].begin):
        if stored.begin < last:
            cursor.fail(f"tensors {before!r} and {name!r} overlap")
        last, before = stored.end, name


class _Cursor:
    """Reads forward, in pieces, never past the bounds."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.path = path
        self.size = os.fstat(file.fileno()).st_size
        self.position = 0
        self._file = file
        self._data = bytearray()
        self._strings = 0

    def fail(self, text: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: {text}")

    def take(self, count: int) -> bytes:
        self._need(self.position + count)
        piece = bytes(self._data[self.position : self.position + count])
        self.position += count
        return piece

    def numbers(self, code: str, count: int) -> tuple[int, ...]:
        return struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(f"<{code}")))

    def string(self, limit: int) -> bytes:
        (length,) = self.numbers("Q", 1)
        if length > limit:
            self.fail(f"a string of {length} bytes; at most {limit} are read here")
        return self.take(length)

    def name(self, limit: int) -> str:
        try:
            return self.string(limit).decode()
        except UnicodeDecodeError:
            self.fail("a name is no valid UTF-8")

    def value(self, key: str) -> Value:
        (kind,) = self.numbers("I", 1)
        if kind == _STRING:
            return self.string(MAX_STRING_BYTES)
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _NUMBERS:
            self.fail(f"key {key[:100]!r} has value type {kind}, which no version knows")
        (number,) = self.numbers(_NUMBERS[kind], 1)
        return bool(number) if kind == _BOOL else number

    def _array(self, key: str) -> Value:
        (kind,) = self.numbers("I", 1)
        (count,) = self.numbers("Q", 1)
        if kind == _STRING:
            return self._string_array(count, key)
        if kind not in _NUMBERS:
            self.fail(f"key {key[:100]!r} is an array of type {kind}; numbers and strings are read")
        code = _NUMBERS[kind]
        if count * struct.calcsize(f"<{code}") > MAX_ARRAY_BYTES:
            self.fail(f"key {key[:100]!r} is an array of {count} numbers; at most {MAX_ARRAY_BYTES} bytes are read")
        data = self.take(count * struct.calcsize(f"<{code}"))
        if code in "fd":
            return array("d", struct.unpack(f"<{count}{code}", data))
        return array("Q" if code == "Q" else "q", struct.unpack(f"<{count}{code}", data))

    def _string_array(self, count: int, key: str) -> list[bytes]:
        self._strings += count
        if self._strings > MAX_STRINGS or 8 * count > self.size:
            self.fail(f"key {key[:100]!r} is an array of {count} strings; at most {MAX_STRINGS} are read")
        # The one loop that runs hundreds of thousands of times: everything in local variables.
        found: list[bytes] = []
        append, unpack, data, place, known = (
            found.append,
            _LENGTH.unpack_from,
            self._data,
            self.position,
            len(self._data),
        )
        for _ in range(count):
            if place + 8 > known:
                self._need(place + 8)
                known = len(data)
            end = place + 8 + unpack(data, place)[0]
            if end > known:
                self._need(end)
                known = len(data)
            append(bytes(data[place + 8 : end]))
            place = end
        self.position = place
        return found

    def _need(self, end: int) -> None:
        """Has at least `end` bytes of the file in memory."""
        if end <= len(self._data):
            return
        if end > self.size:
            self.fail(f"{self.size} bytes are too few for its header")
        if end > MAX_HEADER_BYTES:
            self.fail(f"its header has more than {MAX_HEADER_BYTES} bytes")
        wanted = min(max(end, len(self._data) + READ_BYTES), self.size)
        while len(self._data) < wanted:
            piece = os.pread(self._file.fileno(), wanted - len(self._data), len(self._data))
            if not piece:
                self.fail("it was cut short while it was read")
            self._data += piece


_LENGTH = struct.Struct("<Q")


def _short(value: object) -> str:
    return "missing" if value is None else repr(value)[:100]
