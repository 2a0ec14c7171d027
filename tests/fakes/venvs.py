"""Virtual environments for other people's clients and stubs, whose packages cannot share ours.

Made once under .cache/venvs and reused while the requirements stay the same. Where no package index can be reached the
test is skipped and says so.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TRITON = ("tritonclient[grpc]==2.73.0", "protobuf==6.33.6", "grpcio==1.85.1", "numpy==2.4.6", "ml_dtypes==0.5.4")
SCRIPT_S = 120.0
NO_INDEX = ("No matching distribution", "Could not find a version", "Connection", "Temporary failure", "timed out")


def python_with(name: str, requirements: tuple[str, ...]) -> Path:
    """The Python of environment `name`, which has exactly these requirements and what they need."""
    venv = ROOT / ".cache" / "venvs" / name
    python, stamp = venv / "bin" / "python", venv / "requirements"
    wanted = "\n".join(requirements)
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True, capture_output=True)
    command = [python, "-m", "pip", "install", "--quiet", "--retries", "0", *requirements]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        if any(text in done.stderr for text in NO_INDEX):
            pytest.skip(f"the package index cannot be reached: {done.stderr.strip().splitlines()[-1]}")
        raise AssertionError(done.stderr)
    stamp.write_text(wanted)
    return python


def run_script(python: Path, script: Path, *arguments: str, text: str = "") -> str:
    """What `script` writes to stdout; fails with its stderr when it does not end well."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [python, script, *arguments],
        input=text,
        capture_output=True,
        text=True,
        env=environment,
        cwd=script.parent,
        timeout=SCRIPT_S,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
