"""Opens a model as a *variant*: its checkpoint, its tokenizer's identity, and the digest that fences what it makes.

No weights are read here but for hashing; executors read them from the checkpoint and then ask whether the files are
still the ones that were hashed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.checkpoints.architecture import Architecture, Checkpoint, CheckpointError
from engine.checkpoints.digest_cache import DigestCache
from engine.checkpoints.digests import TEXT_FILES, tokenizer_digest
from engine.checkpoints.files import identity, read_bounded
from engine.checkpoints.hf_config import MAX_CONFIG_BYTES
from engine.checkpoints.known_tokens import KnownTokens, known_tokens
from engine.checkpoints.opening import MAX_BYTES, REMEMBER_NOTHING, open_checkpoint

GENERATION_CONFIG = "generation_config.json"
TEXTS = ("config.json", GENERATION_CONFIG, *TEXT_FILES)
"""What the digest of a directory covers besides the weights."""

Identity = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Variant:
    """An opened model. `digest` differs whenever its tokens could."""

    digest: str
    tokenizer_digest: str
    architecture: Architecture
    checkpoint: Checkpoint
    path: Path
    known: KnownTokens
    files: tuple[tuple[Path, Identity | None], ...]
    """Everything the digest covers, as it was when hashing began."""

    def check_unchanged(self) -> None:
        """To be called when the weights have been read. Raises CheckpointError if a file is another one by now."""
        for path, before in self.files:
            if identity(path) != before:
                raise CheckpointError(f"{path} changed while the model was read; load it again")


def load(path: Path, arithmetic: str, max_bytes: int = MAX_BYTES, digests: DigestCache = REMEMBER_NOTHING) -> Variant:
    """Opens a Hugging Face directory or a GGUF file. `arithmetic` names the executor's number formats, `max_bytes`
    bounds the weight files. Raises CheckpointError, also when a file changes meanwhile: its digest would name others.
    """
    is_file = path.suffix == ".gguf"
    before = _identities([path] if is_file else [*(path / name for name in TEXTS), *_weight_files(path)])
    checkpoint = open_checkpoint(path, max_bytes, digests)
    try:
        weights = digests.file_digest(path) if is_file else checkpoint.weight_files_digest
        tokens = _tokenizer_digest(path)
        generation = "" if is_file else _generation_digest(path)
        arch = checkpoint.architecture
        known = known_tokens(path, arch.vocab_size, arch.end_token_ids)
        if known != KnownTokens(arch.vocab_size):
            arithmetic += " known-tokens-only"
        digest = _digest(weights, arch, generation, tokens, arithmetic)
        variant = Variant(digest, tokens, arch, checkpoint, path, known, before)
        variant.check_unchanged()
    except OSError as error:
        checkpoint.close()
        raise CheckpointError(f"{path}: {error}") from None
    except BaseException:
        checkpoint.close()
        raise
    return variant


def _identities(paths: Sequence[Path]) -> tuple[tuple[Path, Identity | None], ...]:
    return tuple((path, identity(path)) for path in paths)


def _weight_files(directory: Path) -> list[Path]:
    """Weight files there now; one that appears later is another variant too, so the single file always counts."""
    try:
        found = sorted(directory.glob("*.safetensors"))
    except OSError:
        found = []
    return sorted({directory / "model.safetensors", directory / "model.safetensors.index.json", *found})


def _tokenizer_digest(path: Path) -> str:
    try:
        return tokenizer_digest(path)
    except OSError as error:
        raise CheckpointError(f"{path}: no readable tokenizer ({error})") from None


def _generation_digest(directory: Path) -> str:
    path = directory / GENERATION_CONFIG
    if not path.exists():
        return ""
    return hashlib.sha256(read_bounded(path, MAX_CONFIG_BYTES)).hexdigest()


def _digest(weights: str, arch: Architecture, generation: str, tokens: str, arithmetic: str) -> str:
    """sha256 over the weights, the architecture, the generation settings, the tokenizer and the arithmetic plan."""
    hasher = hashlib.sha256(b"autoglm-variant-4\0")
    for part in (weights, repr(arch), generation, tokens, arithmetic):
        data = part.encode()
        hasher.update(len(data).to_bytes(8, "little") + data)
    return f"sha256:{hasher.hexdigest()}"
