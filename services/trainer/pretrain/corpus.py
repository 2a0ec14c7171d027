"""The training text: the running interpreter's standard library, cleaned and split by top-level package.

Called by the pretraining command. Holding out whole packages (not lines) keeps the held-out figure honest: code of
one package never stands on both sides, nor do that package's tests. Knows nothing of tokens or models.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HELD_OUT = frozenset(
    {
        "argparse",
        "concurrent",
        "configparser",
        "csv",
        "dataclasses",
        "fractions",
        "heapq",
        "html",
        "http",
        "json",
        "logging",
        "sched",
        "shelve",
        "statistics",
        "string",
        "tomllib",
        "wsgiref",
        "zipfile",
    }
)
"""Top-level packages kept for measurement: varied in style, no vendored twins in the training side."""

EXCLUDED = frozenset(
    {
        "site-packages",
        "encodings",
        "__pycache__",
        "idlelib",
        "lib2to3",
        "turtledemo",
        "ensurepip",
        "pydoc_data",
        "__phello__",
        "config-3.11-x86_64-linux-gnu",
    }
)
MAX_FILE_BYTES = 400_000
SHINGLE_WORDS = 5
NEAR_DUPLICATE_JACCARD = 0.8
SKETCH_SIZE = 256


@dataclass(frozen=True, slots=True)
class Document:
    """One source file. `package` is the top-level package that decides its side of the split."""

    path: str
    package: str
    text: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def is_held_out(self) -> bool:
        return self.package in HELD_OUT


@dataclass(frozen=True, slots=True)
class Corpus:
    train: tuple[Document, ...]
    held_out: tuple[Document, ...]
    dropped: dict[str, str]
    """path → reason, for every file that was seen and not used."""

    def manifest(self) -> dict[str, object]:
        """What the model card publishes: which files, by hash, on which side."""
        return {
            "python": sys.version.split()[0],
            "held_out_packages": sorted(HELD_OUT),
            "train": {d.path: d.sha256 for d in self.train},
            "held_out": {d.path: d.sha256 for d in self.held_out},
            "dropped": dict(sorted(self.dropped.items())),
        }


def load(root: Path | None = None) -> Corpus:
    """Reads, cleans, de-duplicates and splits every `.py` file below `root` (default: this interpreter's stdlib)."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    dropped: dict[str, str] = {}
    documents: list[Document] = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if EXCLUDED & set(relative.parts):
            continue
        reason, text = _read(path)
        if reason:
            dropped[str(relative)] = reason
            continue
        package = _package(relative)
        if package is None:
            dropped[str(relative)] = "test of a held-out package"
            continue
        documents.append(Document(str(relative), package, _without_licence(text)))
    # Held-out documents first, so that of a near-duplicate pair the training copy is the one that goes.
    documents.sort(key=lambda d: (not d.is_held_out, d.path))
    duplicates = near_duplicates([d.text for d in documents])
    for index, twin in duplicates.items():
        dropped[documents[index].path] = f"near-duplicate of {documents[twin].path}"
    kept = [d for i, d in enumerate(documents) if i not in duplicates]
    return Corpus(
        train=tuple(d for d in kept if not d.is_held_out),
        held_out=tuple(d for d in kept if d.is_held_out),
        dropped=dropped,
    )


def near_duplicates(texts: Sequence[str]) -> dict[int, int]:
    """index → earlier index whose word 5-gram Jaccard similarity is ≥ 0.8, estimated from bottom-k sketches.

    Sketch: Broder, "On the resemblance and containment of documents" (1997), with k = 256.
    """
    sketches = [_sketch(text) for text in texts]
    owners: dict[int, list[int]] = defaultdict(list)
    twins: dict[int, int] = {}
    for index, sketch in enumerate(sketches):
        shared: dict[int, int] = defaultdict(int)
        for value in sketch:
            for owner in owners[value]:
                shared[owner] += 1
        for owner, _ in sorted(shared.items(), key=lambda item: -item[1])[:5]:
            union = sorted(sketch | sketches[owner])[:SKETCH_SIZE]
            both = sum(1 for value in union if value in sketch and value in sketches[owner])
            if union and both / len(union) >= NEAR_DUPLICATE_JACCARD:
                twins[index] = owner
                break
        else:
            for value in sketch:
                owners[value].append(index)
    return twins


@dataclass(frozen=True, slots=True)
class Exchange:
    """A chat turn made from a documented function: what a user would ask, and the code that answers."""

    request: str
    answer: str


def exchanges(document: Document) -> Iterator[Exchange]:
    """Documented top-level functions and methods of a file as request → code pairs (for the chat template)."""
    try:
        tree = ast.parse(document.text)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef):
            continue
        doc = ast.get_docstring(node)
        if not doc or len(doc) < 20 or len(node.body) < 2:
            continue
        source = ast.get_source_segment(document.text, node)
        if source is None or not 80 <= len(source) <= 2500:
            continue
        summary = " ".join(doc.split("\n\n")[0].split())
        indent = " " * node.col_offset
        answer = re.sub(rf"(?m)^{indent}", "", indent + source) if indent else source
        yield Exchange(f"Write a Python function `{node.name}`. {summary}", answer)


def _read(path: Path) -> tuple[str, str]:
    raw = path.read_bytes()
    if len(raw) > MAX_FILE_BYTES:
        return f"larger than {MAX_FILE_BYTES} bytes", ""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return "not UTF-8", ""
    if len(text.strip()) < 64:
        return "shorter than 64 characters", ""
    printable = sum(1 for c in text if ord(c) < 128) / len(text)
    if printable < 0.95:
        return "mostly a character table", ""
    digits = sum(c.isdigit() for c in text) / len(text)
    if digits > 0.25:
        return "mostly numbers", ""
    return "", text.replace("\r\n", "\n")


def _package(relative: Path) -> str | None:
    """The top-level package, `test` for the test-suite, None for tests of a held-out package."""
    parts = relative.with_suffix("").parts
    top = parts[0]
    if top not in {"test", "distutils"} and "tests" not in parts and "test" not in parts[1:]:
        return top
    words = {word for part in parts for word in re.split(r"[_\d]+", part)}
    return None if words & HELD_OUT else "test"


def _without_licence(text: str) -> str:
    """Leading comment blocks that are copyright or licence notices teach a model nothing but notices."""
    lines = text.split("\n")
    start = 1 if lines and lines[0].startswith("#!") else 0
    end = start
    while end < len(lines) and (lines[end].startswith("#") or not lines[end].strip()):
        end += 1
    head = "\n".join(lines[:end]).lower()
    return "\n".join(lines[end:]) if "copyright" in head or "licen" in head else text


def _sketch(text: str) -> frozenset[int]:
    words = re.findall(r"\w+|[^\w\s]", text)
    shingles = {" ".join(words[i : i + SHINGLE_WORDS]) for i in range(max(1, len(words) - SHINGLE_WORDS + 1))}
    hashes = (int.from_bytes(hashlib.blake2b(s.encode(), digest_size=8).digest(), "big") for s in shingles)
    return frozenset(sorted(hashes)[:SKETCH_SIZE])
