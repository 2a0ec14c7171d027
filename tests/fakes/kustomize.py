"""Builds kustomizations with the real Kustomize, alone or inside kubectl, whichever is installed.

Without one (or with an old one: the kubectl of Debian 12 cannot read `labels`) tests that need it are skipped, visibly.
"""

from __future__ import annotations

import copy
import functools
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
OLDEST = (5, 0)

Object = dict[str, Any]


@functools.cache
def command() -> tuple[str, ...] | None:
    """How Kustomize is called here, or None."""
    for words in (("kustomize", "build"), ("kubectl", "kustomize")):
        if shutil.which(words[0]) is None:
            continue
        asked = ["kustomize", "version"] if words[0] == "kustomize" else ["kubectl", "version", "--client"]
        text = subprocess.run(asked, capture_output=True, text=True).stdout
        word = next((part for part in text.split() if part.startswith("v") and "." in part), "")
        if words[0] == "kubectl":
            word = text.partition("Kustomize Version: ")[2].strip()
        if tuple(int(part) for part in word.lstrip("v").split(".")[:2] if part.isdigit()) >= OLDEST:
            return words
    return None


@functools.cache
def _built(folder: Path) -> tuple[Object, ...]:
    words = command()
    if words is None:
        pytest.skip(f"neither kustomize nor a kubectl with Kustomize {OLDEST[0]}.{OLDEST[1]} is installed")
    done = subprocess.run([*words, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    found = tuple(yaml.load_all(done.stdout, loader))  # a safe loader, either way
    return tuple(document for document in found if document is not None)


def build(folder: str | Path) -> list[Object]:
    """Every object of the kustomization in a folder of the repository; the caller's own copies."""
    return copy.deepcopy(list(_built(ROOT / folder)))
