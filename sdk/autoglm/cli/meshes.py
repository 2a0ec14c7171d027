"""Meshes on this machine, as their supervisors tell of them: the state file in each run directory, and pages over HTTP.

The file and the pages are JSON and Prometheus text; nothing of the mesh's own code is needed to read them.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoglm.errors import InvalidRequestError, UnavailableError

DEFAULT_RUN_DIRECTORY = Path(".run")
MAX_STATE_BYTES = 4 << 20
MAX_PAGE_BYTES = 16 << 20
TIMEOUT_S = 3.0
_SAMPLE = re.compile(r"^([A-Za-z_:][\w:]*)(?:\{(.*)\})? (\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True, slots=True)
class Running:
    """One mesh: the name of its cloud, and what its state file says."""

    cloud: str
    root: Path
    state: Mapping[str, Any]

    @property
    def phase(self) -> str:
        """What the supervisor says, or `gone` when it died without a word."""
        return str(self.state["phase"]) if _is_alive(int(self.state["pid"])) else "gone"

    @property
    def addresses(self) -> Mapping[str, str]:
        found: Mapping[str, str] = self.state["addresses"]
        return found


@dataclass(frozen=True, slots=True)
class Sample:
    """One line of a metrics page."""

    name: str
    labels: Mapping[str, str]
    value: float


def find(directories: Sequence[Path]) -> list[Running]:
    """The meshes in these run directories; with none given, `.run` (or AUTOGLM_RUN_DIR) and the clouds below it.

    Raises `UnavailableError` when there is no mesh, and for a directory that was named and has none.
    """
    if directories:
        found = [(root, _read(root)) for root in directories]
        if missing := [str(root) for root, state in found if state is None]:
            raise UnavailableError(f"no mesh has run in {', '.join(missing)}: there is no readable state.json")
    else:
        home = Path(os.environ.get("AUTOGLM_RUN_DIR") or DEFAULT_RUN_DIRECTORY)
        found = [(root, _read(root)) for root in (home, *sorted((home / "clouds").glob("*")))]
    running = [Running(_cloud(root), root, state) for root, state in found if state is not None]
    if not running:
        raise UnavailableError("no mesh runs here; start one with `make run`, or name its directory with --run-dir")
    return running


def samples(page: str) -> Iterator[Sample]:
    """The samples of a page in Prometheus's text format; lines that are none are passed over."""
    for line in page.splitlines():
        if line.startswith("#") or (match := _SAMPLE.match(line)) is None:
            continue
        try:
            value = float(match[3])
        except ValueError:
            continue
        yield Sample(match[1], dict(_LABEL.findall(match[2] or "")), value)


def get(address: str, path: str, limit: int = MAX_PAGE_BYTES) -> bytes:
    """The body of a page. Raises `UnavailableError`, or `LookupError` for a 404."""
    url = f"{address if '://' in address else f'http://{address}'}".rstrip("/") + path
    if not url.startswith(("http://", "https://")):
        raise InvalidRequestError(f"{address} is neither host:port nor an http URL")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=TIMEOUT_S) as response:
            body: bytes = response.read(limit)
            return body
    except urllib.error.HTTPError as error:
        if error.code == 404:
            raise LookupError(url) from None
        raise UnavailableError(f"{url} answered {error.code}") from None
    except (OSError, http.client.HTTPException) as error:
        raise UnavailableError(f"{url} does not answer: {error}") from None


def _read(root: Path) -> Mapping[str, Any] | None:
    try:
        state = json.loads((root / "state.json").read_bytes()[:MAX_STATE_BYTES])
    except (OSError, ValueError):
        return None
    wanted = {"phase", "pid", "addresses", "processes", "policy"}
    return state if isinstance(state, dict) and wanted <= state.keys() else None


def _cloud(root: Path) -> str:
    where = root.absolute()
    return where.name if where.parent.name == "clouds" else "local"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
