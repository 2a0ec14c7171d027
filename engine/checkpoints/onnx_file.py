"""Looks an ONNX file over before any runtime may load it: data from strangers, read within bounds.

Walks the protobuf's structure without building it: which files its weights come from, which operator domains it wants,
how large it is in all. Weights outside the model's directory, operators that would need a library to be loaded, and
files that are truncated or nested without end are refused with a CheckpointError. Called by the ONNX executor; knows
nothing of what the operators mean.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from engine.checkpoints.architecture import CheckpointError
from engine.checkpoints.files import identity, open_regular

MODEL_FILE = "model.onnx"
OTHER_WEIGHTS = (".safetensors", ".gguf")
MAX_STRUCTURE_BYTES = (2 << 30) - 1
"""Largest protobuf; more weights than that live in external files."""
MAX_FIELDS = 500_000
"""A node has a dozen. Walking this many takes about a second."""
MAX_DEPTH = 64
MAX_EXTERNAL_FILES = 1024
MAX_NAME_BYTES = 1024
HASH_PIECE = 1 << 20

DOMAINS = frozenset(
    ("", "ai.onnx", "ai.onnx.ml", "ai.onnx.training", "ai.onnx.preview", "ai.onnx.preview.training", "com.microsoft",
     "com.microsoft.nchwc", "com.microsoft.experimental", "com.ms.internal.nhwc")
)  # fmt: skip
"""Operator domains that the runtime itself implements. Any other would need a custom-op library."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_CHILDREN: dict[str, dict[int, str]] = {
    "model": {7: "graph", 8: "opset", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "function": {7: "node", 9: "opset", 11: "attribute"},
    "tensor": {13: "external"},
}
"""Message → field number → message, of onnx.proto3: only what leads to tensors and domains."""
_NODE_DOMAIN, _FUNCTION_DOMAIN, _OPSET_DOMAIN = 7, 10, 1


@dataclass(frozen=True, slots=True)
class OnnxFile:
    """A file that may be given to a runtime. `digest` covers the structure and every external file."""

    path: Path
    digest: str
    external: tuple[Path, ...]
    total_bytes: int


@dataclass(slots=True)
class _Found:
    fields: int = 0
    domains: set[str] = field(default_factory=set)
    defined: set[str] = field(default_factory=set)
    """Domains of functions that the model itself spells out in other operators."""
    external: dict[str, int] = field(default_factory=dict)
    """Location → bytes that some tensor wants of it."""


def find(place: Path) -> Path | None:
    """The ONNX file that `place` means: itself, or the model.onnx of a directory with no other kind of weights."""
    if place.suffix == ".onnx":
        return place
    candidate = place / MODEL_FILE
    others = [candidate for suffix in OTHER_WEIGHTS for candidate in place.glob(f"*{suffix}")]
    return candidate if candidate.is_file() and not others else None


def examine(path: Path, max_bytes: int) -> OnnxFile:
    """Checks the file at `path` and the files it names. `max_bytes` bounds all of them together."""
    try:
        before = identity(path)
        found, hasher, total = _Found(), hashlib.sha256(b"autoglm-onnx-1\0"), 0
        with open_regular(path) as file:
            size = path.stat().st_size
            if size > min(max_bytes, MAX_STRUCTURE_BYTES):
                limit = min(max_bytes, MAX_STRUCTURE_BYTES)
                raise CheckpointError(f"{path}: {size} bytes, at most {limit} are read")
            if size == 0:
                raise CheckpointError(f"{path}: empty")
            # Not closed by hand: pieces of it may still be held by an exception's frames.
            view = memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ))
            _walk(view, "model", found, 0, path)
            for start in range(0, size, HASH_PIECE):
                hasher.update(view[start : start + HASH_PIECE])
        total += size
        strange = sorted(found.domains - found.defined - DOMAINS)
        if strange:
            raise CheckpointError(
                f"{path}: operators of {', '.join(strange[:5])} need a custom-op library; such libraries are not loaded"
            )
        external = []
        for location, wanted in sorted(found.external.items()):
            other = _inside(path, location)
            total += _check_external(path, location, other, wanted)
            if total > max_bytes:
                raise CheckpointError(f"{path}: with its external data {total} bytes, at most {max_bytes} are read")
            external.append(other)
        for other in external:
            hasher.update(other.relative_to(path.parent.resolve()).as_posix().encode() + b"\0")
            _hash_file(other, hasher.update)
        if identity(path) != before:
            raise CheckpointError(f"{path}: the file changed while it was read; load it again")
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None
    return OnnxFile(path, f"sha256:{hasher.hexdigest()}", tuple(external), total)


def _walk(view: memoryview, kind: str, found: _Found, depth: int, path: Path) -> None:
    if depth > MAX_DEPTH:
        raise CheckpointError(f"{path}: graphs nested deeper than {MAX_DEPTH}")
    children = _CHILDREN.get(kind, {})
    entry: dict[str, str] = {}
    domain = ""
    for number, value in _fields(view, found, path):
        child = children.get(number)
        if child == "external":
            key, text = _pair(value, found, path)
            entry[key] = text
            if key == "location":
                found.external.setdefault(text, 0)
                if len(found.external) > MAX_EXTERNAL_FILES:
                    raise CheckpointError(f"{path}: weights in more than {MAX_EXTERNAL_FILES} external files")
        elif child is not None:
            _walk(value, child, found, depth + 1, path)
        elif (kind, number) in (("node", _NODE_DOMAIN), ("opset", _OPSET_DOMAIN)):
            domain = _text(value, path)
        elif (kind, number) == ("function", _FUNCTION_DOMAIN):
            found.defined.add(_text(value, path))
    if kind == "node":
        found.domains.add(domain)
    if entry:
        _note_external(entry, found, path)


def _note_external(entry: dict[str, str], found: _Found, path: Path) -> None:
    if not entry.get("location"):
        raise CheckpointError(f"{path}: a tensor's external data has no location")
    numbers = {}
    for key in ("offset", "length"):
        text = entry.get(key, "0")
        if not (text.isascii() and text.isdigit() and len(text) < 19):
            raise CheckpointError(f"{path}: a tensor's external data has {key} {text[:32]!r}")
        numbers[key] = int(text)
    location = entry["location"]
    found.external[location] = max(found.external[location], numbers["offset"] + numbers["length"])


def _fields(view: memoryview, found: _Found, path: Path) -> Iterator[tuple[int, memoryview]]:
    """Field numbers with the bytes of those that have a length; plain numbers lead nowhere and are passed over."""
    at, end, count = 0, len(view), found.fields
    while at < end:
        count += 1
        if count > MAX_FIELDS:
            raise CheckpointError(f"{path}: more than {MAX_FIELDS} protobuf fields")
        key = view[at]
        at += 1
        if key >= 0x80:
            key, at = _varint(view, at - 1, path)
        wire = key & 7
        if wire == _BYTES:
            size, at = _varint(view, at, path)
            if size > end - at:
                raise CheckpointError(f"{path}: not an ONNX file, or a truncated one")
            found.fields = count
            yield key >> 3, view[at : at + size]
            count = found.fields  # the caller has walked further meanwhile
            at += size
        elif wire == _VARINT:
            if at < end and view[at] < 0x80:
                at += 1
            else:
                _, at = _varint(view, at, path)
        elif wire in (_FIXED32, _FIXED64):
            at += 4 if wire == _FIXED32 else 8
            if at > end:
                raise CheckpointError(f"{path}: not an ONNX file, or a truncated one")
        else:
            raise CheckpointError(f"{path}: not an ONNX file (wire type {wire})")
    found.fields = count


def _varint(view: memoryview, at: int, path: Path) -> tuple[int, int]:
    value = 0
    for index in range(10):
        if at + index >= len(view):
            break
        byte = view[at + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, at + index + 1
    raise CheckpointError(f"{path}: not an ONNX file, or a truncated one")


def _pair(view: memoryview, found: _Found, path: Path) -> tuple[str, str]:
    """Key and value of a StringStringEntryProto."""
    texts = {1: "", 2: ""}
    for number, value in _fields(view, found, path):
        if number in texts:
            texts[number] = _text(value, path)
    return texts[1], texts[2]


def _text(view: memoryview, path: Path) -> str:
    if len(view) > MAX_NAME_BYTES:
        raise CheckpointError(f"{path}: a name of {len(view)} bytes, at most {MAX_NAME_BYTES} are read")
    try:
        return bytes(view).decode()
    except UnicodeDecodeError:
        raise CheckpointError(f"{path}: a name that is not UTF-8") from None


def _inside(path: Path, location: str) -> Path:
    """The file a tensor names, which must lie in the model's own directory, links followed."""
    pure = PurePosixPath(location)
    home = path.parent.resolve()
    strange = pure.is_absolute() or ".." in pure.parts or "\\" in location or "\0" in location or "*" in location
    if not strange:
        target = (home / pure).resolve()
        if target.is_relative_to(home) and target != home:
            return target
    raise CheckpointError(
        f"{path}: external data {location!r} lies outside the model's directory; copy the file there and name it so"
    )


def _check_external(path: Path, location: str, other: Path, wanted: int) -> int:
    try:
        with open_regular(other):
            size = other.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{path}: external data {location!r}: {error.strerror or error}") from None
    if wanted > size:
        raise CheckpointError(f"{path}: external data {location!r} has {size} bytes, its tensors want {wanted}")
    return size


def _hash_file(path: Path, update: Callable[[bytes], None]) -> None:
    with open_regular(path) as file:
        while piece := file.read(HASH_PIECE):
            update(piece)
