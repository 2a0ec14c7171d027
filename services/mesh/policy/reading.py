"""YAML of strangers, read within bounds: size and depth limited, no aliases, no repeated keys, no tags.

A few lines of aliases can unfold to gigabytes, and plain loading drops the first of two equal keys without a word.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from services.mesh.policy.problems import Problem

SUFFIXES = {".yaml", ".yml"}


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on what is read."""

    files: int = 64
    file_bytes: int = 256 * 1024
    objects: int = 512
    depth: int = 32
    nodes: int = 50_000
    """YAML events in one file."""
    problems: int = 200
    """Mistakes reported before giving up."""


DEFAULT_LIMITS = Limits()


def shown(path: Path) -> str:
    """The path as a person here would type it."""
    try:
        return str(path.resolve().relative_to(Path.cwd().resolve()))
    except ValueError:
        return str(path)


def documents(path: Path, name: str, limits: Limits, problems: list[Problem]) -> Iterator[Any]:
    """The objects of a file; what is wrong with it goes to `problems`."""
    try:
        with path.open("rb") as stream:
            raw = stream.read(limits.file_bytes + 1)
        if len(raw) > limits.file_bytes:
            raise yaml.YAMLError(f"larger than {limits.file_bytes} bytes")
        found_all = parse(raw.decode("utf-8"), limits)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError) as error:
        problems.append(Problem(name, "", "", " ".join(str(error).split())))
        return
    found = [document for document in found_all if document is not None]
    if not found:  # cut short by an editor or a full disk, sooner than meant
        problems.append(Problem(name, "", "", "holds no object; delete the file if that is what you mean"))
    yield from found


def parse(text: str, limits: Limits) -> list[Any]:
    """The documents of a text. Raises `yaml.YAMLError` or ValueError."""
    _refuse_traps(text, limits)
    return list(yaml.load_all(text, Loader=_UniqueKeys))  # a SafeLoader that also refuses repeated keys


def _refuse_traps(text: str, limits: Limits) -> None:
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        line = event.start_mark.line + 1 if event.start_mark is not None else 0
        if count > limits.nodes:
            raise yaml.YAMLError(f"more than {limits.nodes} YAML nodes")
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError(f"line {line}: aliases are not allowed")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > limits.depth:
                raise yaml.YAMLError(f"line {line}: nested deeper than {limits.depth}")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


class _UniqueKeys(yaml.SafeLoader):
    """Plain safe loading drops the first of two equal keys without a word; here that is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                raise yaml.YAMLError(f"line {key.start_mark.line + 1}: keys must be text")
            if key.value in seen:
                raise yaml.YAMLError(f"line {key.start_mark.line + 1}: key '{key.value}' is repeated")
            seen.add(key.value)
        return super().construct_mapping(node, deep)
