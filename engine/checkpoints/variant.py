"""Loads a model directory as a *variant*: weights, tokenizer identity, and the digest that fences what it makes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from engine.checkpoints import glm
from engine.checkpoints.digests import tokenizer_digest

CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Variant:
    """A loaded model. `digest` differs whenever its tokens could."""

    digest: str
    tokenizer_digest: str
    weights: glm.GlmWeights
    directory: Path


def load(directory: Path, arithmetic: str) -> Variant:
    """Reads a Hugging Face GLM directory. `arithmetic` names the executor's number formats. Raises CheckpointError."""
    try:
        tokens = tokenizer_digest(directory)
    except OSError as error:
        raise glm.CheckpointError(f"{directory}: no readable tokenizer ({error})") from None
    weights = glm.load(directory)
    plan = {"arithmetic": arithmetic, "sparsity": "none", "bits": 32}
    return Variant(_digest(directory, tokens, plan), tokens, weights, directory)


def _digest(directory: Path, tokens: str, plan: dict[str, object]) -> str:
    """sha256 over the weights file, the configuration as read, the tokenizer's digest and the arithmetic plan."""
    hasher = hashlib.sha256(b"autoglm-variant-1\0")
    for part in (
        file_sha256(directory / "model.safetensors"),
        repr(glm.read_config(directory / "config.json")),
        tokens,
        json.dumps(plan, sort_keys=True),
    ):
        data = part.encode()
        hasher.update(len(data).to_bytes(8, "little") + data)
    return f"sha256:{hasher.hexdigest()}"


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(CHUNK):
            hasher.update(piece)
    return hasher.hexdigest()
