"""Builds the contents of a container image without a container engine: its Dockerfile, read strictly and carried out.

Only what our Dockerfiles use is understood; anything else fails the test. COPY sees what `.dockerignore` lets through.
Paths below /opt/autoglm become paths below a folder of the test's. Three kinds of command are not carried out, because
they change the base image and not our layers: apt-get, pip's own upgrade and the making of the volume's folder. The
kernels are not compiled again but taken from where `make` put them, unless AUTOGLM_COMPILE_KERNELS is set.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOME = "/opt/autoglm"
INSTRUCTIONS = {"ARG", "FROM", "WORKDIR", "RUN", "COPY", "LABEL", "VOLUME", "ENV", "USER", "EXPOSE", "ENTRYPOINT"}


@dataclass(slots=True)
class Image:
    """What the last stage says about itself; `root` stands for /opt/autoglm."""

    root: Path
    base: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    user: str = ""
    workdir: str = "/"
    volumes: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()
    copied: list[str] = field(default_factory=list)
    """Paths of the repository that went in, in order."""
    groups: list[str] = field(default_factory=list)
    """Dependency groups that were installed."""

    def path(self, name: str) -> Path:
        """Where a path of the image lies here."""
        assert name == HOME or name.startswith(HOME + "/"), f"{name} is not below {HOME}"
        return self.root / name[len(HOME) :].lstrip("/")


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """(instruction, rest) pairs; comments gone, continued lines joined."""
    lines = [line for line in dockerfile.read_text().splitlines() if line.strip() and not line.startswith("#")]
    text = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    pairs = []
    for line in text.splitlines():
        name, _, rest = line.partition(" ")
        assert name in INSTRUCTIONS, f"{dockerfile.name}: {name} is not known here"
        pairs.append((name, rest.strip()))
    return pairs


def build(dockerfile: Path, root: Path, python: Path, arguments: Mapping[str, str]) -> Image:
    """Carries the Dockerfile out below `root`, with `python` as the base image's interpreter."""
    image = Image(root)
    globals_: dict[str, str] = {}
    scope: dict[str, str] = {}
    is_first = True
    for name, rest in instructions(dockerfile):
        if name == "ARG":
            key, _, default = rest.partition("=")
            value = arguments.get(key, _expand(default, globals_ | scope)) or globals_.get(key, "")
            (globals_ if is_first else scope)[key] = value
            continue
        if name == "FROM":
            is_first = False
            scope, image.environment, image.workdir = {}, {}, "/"
            image.base = _expand(rest.split(" ")[0], globals_)
            continue
        text = _expand(rest, scope | image.environment, keeps={"PATH"})
        if name == "WORKDIR":
            image.workdir = text
        elif name == "RUN":
            _run(image, text, python)
        elif name == "COPY":
            _copy(image, shlex.split(text))
        elif name in ("ENV", "LABEL"):
            pairs = dict(part.split("=", 1) for part in shlex.split(text))
            (image.environment if name == "ENV" else image.labels).update(pairs)
        elif name == "USER":
            image.user = text
        elif name == "VOLUME":
            image.volumes = tuple(json.loads(text))
        elif name == "ENTRYPOINT":
            image.entrypoint = tuple(json.loads(text))
    return image


def _expand(text: str, values: Mapping[str, str], keeps: frozenset[str] | set[str] = frozenset()) -> str:
    def value(found: re.Match[str]) -> str:
        return found[0] if found[1] in keeps else values[found[1]]

    return re.sub(r"\$\{([A-Z_]+)\}", value, text)


def _run(image: Image, text: str, python: Path) -> None:
    for command in text.split(" && "):
        words = shlex.split(command)
        match words:
            case ["apt-get", *_] | ["rm", "-rf", "/var/lib/apt/lists/*"]:
                pass
            case ["pip", "install", "--no-cache-dir", "--disable-pip-version-check", "pip>=25.1"]:
                pass
            case ["install", "-d", "-o", owner, "-g", _, "/var/lib/autoglm"]:
                assert owner != "0"
            case ["python", "-m", "venv", "--without-pip", where]:
                _call([str(python), "-m", "venv", "--without-pip", "--symlinks", str(image.path(where))])
            case ["python", "-m", "compileall", "-q", where]:
                _call([str(python), "-m", "compileall", "-q", str(image.path(where))])
            case ["pip", "--python", where, "install", "--no-cache-dir", *what]:
                _install(image, image.path(where), what)
            case _:
                raise AssertionError(f"RUN {command}: not known here")


def _install(image: Image, python: Path, what: Sequence[str]) -> None:
    image.groups += [what[i + 1] for i, word in enumerate(what) if word == "--group"]
    if "./kernels" in what and not os.environ.get("AUTOGLM_COMPILE_KERNELS"):
        return _take_compiled(python)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    _call([*pip, "install", "--quiet", "--no-compile", "--retries", "0", *what], cwd=image.root.parent / "build")


def _take_compiled(python: Path) -> None:
    """The kernels as `make` compiled and installed them here: compiling them again takes minutes."""
    site = next((python.parent.parent / "lib").glob("python3.*/site-packages"))
    found = importlib.util.find_spec("autoglm_kernels")
    assert found is not None and found.origin is not None
    shutil.copytree(Path(found.origin).parent, site / "autoglm_kernels", ignore=shutil.ignore_patterns("__pycache__"))


def _copy(image: Image, words: list[str]) -> None:
    if words[0].startswith("--from="):
        assert words[1:] == [HOME, HOME], words  # the stages share one folder here
        return
    *sources, target = words
    folder = image.root.parent / "build" if image.workdir == "/build" else image.path(image.workdir)
    for source in sources:
        image.copied.append(source)
        files = [path for path in sent_files() if path == source or path.startswith(f"{source}/")]
        assert files, f"COPY {source}: nothing of that name reaches the builder"
        for path in files:
            inner = Path(path).name if path == source else os.path.relpath(path, source)
            place = folder / target if path == source and not target.endswith("/") and target != "." else None
            end = place or folder / target / inner
            end.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / path, end)


def sent_files() -> Iterator[str]:
    """Paths that `.dockerignore` sends to the builder: tracked files only, as a clone has them."""
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    tracked = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True)
    for path in tracked.stdout.splitlines():
        is_ignored = False
        for pattern in patterns:
            wanted, negated = pattern.removeprefix("!"), pattern.startswith("!")
            if _matches(path, wanted):
                is_ignored = not negated
        if not is_ignored and (ROOT / path).is_file():
            yield path


def _matches(path: str, pattern: str) -> bool:
    """Whether the pattern names the path or a folder above it."""
    parts = path.split("/")
    for count in range(1, len(parts) + 1):
        head = "/".join(parts[:count])
        if pattern.startswith("**/"):
            if fnmatch.fnmatchcase(parts[count - 1], pattern[3:]):
                return True
        elif head == pattern or ("/" not in head and fnmatch.fnmatchcase(head, pattern)):
            return True
    return False


def _call(command: list[str], cwd: Path | None = None) -> None:
    if cwd is not None:
        cwd.mkdir(parents=True, exist_ok=True)
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(command, cwd=cwd, env=inherited, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}{done.stderr}"[-4000:]
