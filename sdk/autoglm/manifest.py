"""A model by digest: a small list of its files, each with size and SHA-256, whose own SHA-256 names the model.

The list is JSON in exactly one spelling, so one set of files has one digest. `autoglm model push` makes it; workers and
tokenizers fetch the files by it. It is data from a stranger: everything is bounded, and a name can only be a file's.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

FORMAT = "autoglm-model-1"
MAX_FILES = 4096
MAX_MANIFEST_BYTES = 2 << 20
MAX_FILE_BYTES = 1 << 40
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_NAME = re.compile(r"[A-Za-z0-9_+@=(\[][A-Za-z0-9_+@=()\[\], .-]{0,199}")
"""No separator, no leading dot or hyphen: never another folder, never hidden, never an option."""


class BadManifest(ValueError):
    """The bytes are not a list of a model's files; the text says why."""


@dataclass(frozen=True, slots=True)
class ModelFile:
    """One file of a model: `digest` is `sha256:` and 64 hexadecimal digits."""

    name: str
    size: int
    digest: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """A model's files in the order of their names."""

    files: tuple[ModelFile, ...]

    @property
    def total_bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def digest(self) -> str:
        """What names the model."""
        return f"sha256:{hashlib.sha256(self.encoded()).hexdigest()}"

    @property
    def single_file(self) -> str | None:
        """The name of a model that is one file, such as a .gguf."""
        found = [file.name for file in self.files if file.name.endswith((".gguf", ".onnx"))]
        has_config = any(file.name == "config.json" for file in self.files)
        return found[0] if len(found) == 1 and not has_config else None

    def encoded(self) -> bytes:
        """The one spelling: sorted keys, no spaces, ASCII."""
        files = [{"bytes": file.size, "digest": file.digest, "name": file.name} for file in self.files]
        return json.dumps({"files": files, "format": FORMAT}, sort_keys=True, separators=(",", ":")).encode()


def is_digest(text: str) -> bool:
    """Whether a model is meant by digest, well formed or not, and not by path."""
    return text.startswith("sha256:")


def hexadecimal(digest: str) -> str:
    """The digits of a digest. Raises BadManifest."""
    match = _DIGEST.fullmatch(digest)
    if match is None:
        raise BadManifest(f"{digest[:80]!r} is not sha256: and 64 lower-case hexadecimal digits")
    return match[1]


def check_name(name: str) -> None:
    """Raises BadManifest for what cannot be a file of a model."""
    if not _NAME.fullmatch(name) or name.endswith((" ", ".")):
        raise BadManifest(f"{name[:80]!r} cannot be a model's file: letters, digits and a few signs, no folders")


def make(files: Sequence[ModelFile]) -> Manifest:
    """The manifest of these files. Raises BadManifest."""
    if not 0 < len(files) <= MAX_FILES:
        raise BadManifest(f"{len(files)} files; a model has 1 to {MAX_FILES}")
    ordered = tuple(sorted(files, key=lambda file: file.name))
    if len({file.name.casefold() for file in ordered}) < len(ordered):
        raise BadManifest("two files have the same name, letter case aside")
    for file in ordered:
        check_name(file.name)
        hexadecimal(file.digest)
        if not 0 <= file.size <= MAX_FILE_BYTES:
            raise BadManifest(f"{file.name}: {file.size} bytes; a file has 0 to {MAX_FILE_BYTES}")
    return Manifest(ordered)


def parse(data: bytes, digest: str) -> Manifest:
    """The manifest that `digest` names. Raises BadManifest."""
    if len(data) > MAX_MANIFEST_BYTES:
        raise BadManifest(f"{digest} has {len(data)} bytes; a list of files has at most {MAX_MANIFEST_BYTES}")
    if hashlib.sha256(data).hexdigest() != hexadecimal(digest):
        raise BadManifest(f"the content is not {digest}")
    try:
        outer = json.loads(data)
        if outer["format"] != FORMAT:
            raise BadManifest(f"{digest} has format {str(outer['format'])[:80]!r}, not {FORMAT}")
        files = [ModelFile(str(item["name"]), _whole(item["bytes"]), str(item["digest"])) for item in outer["files"]]
    except BadManifest:
        raise
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BadManifest(
            f"{digest} is not a list of a model's files; push the model and use the digest it prints"
        ) from None
    found = make(files)
    if found.encoded() != data:
        raise BadManifest(f"{digest} is spelled in another way than this program spells it")
    return found


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError
    return value
