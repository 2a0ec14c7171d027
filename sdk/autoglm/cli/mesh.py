"""`autoglm mesh …` hands over to the local control plane where that is installed; the SDK knows nothing of it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

MODULE = "services.mesh"
MISSING = "autoglm: the mesh's own commands need its repository; run this in a clone of it, with its .venv"
WRONG_USAGE = 2


def hand_over(arguments: Sequence[str]) -> int:
    """Runs the control plane's command line with these arguments and returns its exit code."""
    if not _is_here():
        print(MISSING, file=sys.stderr)
        return WRONG_USAGE
    return subprocess.call([sys.executable, "-m", MODULE, *arguments])


def _is_here() -> bool:
    try:
        return importlib.util.find_spec(MODULE) is not None
    except ModuleNotFoundError:  # `python -m` also looks into the current folder, an installed command does not
        return Path("services/mesh/__main__.py").is_file()
