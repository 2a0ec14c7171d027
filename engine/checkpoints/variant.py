"""Loads a model directory as a *variant*: weights, tokenizer identity, and the digest that fences what it makes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from engine.checkpoints import glm
from engine.checkpoints.digests import TEXT_FILES, tokenizer_digest
from engine.checkpoints.files import identity, open_regular, read_bounded

CHUNK = 1 << 20
GENERATION_CONFIG = "generation_config.json"
FILES = ("config.json", "model.safetensors", GENERATION_CONFIG, *TEXT_FILES)
"""Everything the digest covers."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A loaded model. `digest` differs whenever its tokens could."""

    digest: str
    tokenizer_digest: str
    weights: glm.GlmWeights
    directory: Path


def load(directory: Path, arithmetic: str, max_bytes: int = 64 << 30) -> Variant:
    """Reads a Hugging Face GLM directory. `arithmetic` names the executor's number formats, `max_bytes` bounds the
    weights in memory. Raises CheckpointError, also when a file changes meanwhile: its digest would name other tokens.
    """
    before = [identity(directory / name) for name in FILES]
    try:
        tokens = tokenizer_digest(directory)
    except OSError as error:
        raise glm.CheckpointError(f"{directory}: no readable tokenizer ({error})") from None
    weights = glm.load(directory, max_bytes)
    plan = {"arithmetic": arithmetic, "sparsity": "none", "bits": 32}
    try:
        digest = _digest(directory, weights.config, tokens, plan)
    except OSError as error:
        raise glm.CheckpointError(f"{directory}: {error}") from None
    if before != [identity(directory / name) for name in FILES]:
        raise glm.CheckpointError(f"{directory}: its files changed while they were read; load it again")
    return Variant(digest, tokens, weights, directory)


def _digest(directory: Path, config: glm.GlmConfig, tokens: str, plan: dict[str, object]) -> str:
    """sha256 over the weights file, the configurations, the tokenizer's digest and the arithmetic plan."""
    hasher = hashlib.sha256(b"autoglm-variant-2\0")
    generation = directory / GENERATION_CONFIG
    for part in (
        file_sha256(directory / "model.safetensors"),
        repr(config),
        hashlib.sha256(read_bounded(generation, glm.MAX_CONFIG_BYTES)).hexdigest() if generation.exists() else "",
        tokens,
        json.dumps(plan, sort_keys=True),
    ):
        data = part.encode()
        hasher.update(len(data).to_bytes(8, "little") + data)
    return f"sha256:{hasher.hexdigest()}"


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    hasher = hashlib.sha256()
    with open_regular(path) as file:
        while piece := file.read(CHUNK):
            hasher.update(piece)
    return hasher.hexdigest()
