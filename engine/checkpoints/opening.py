"""Opens a model, whichever format it is in: a Hugging Face directory or a GGUF file."""

from __future__ import annotations

from pathlib import Path

from engine.checkpoints.architecture import Checkpoint, CheckpointError
from engine.checkpoints.digest_cache import DigestCache
from engine.checkpoints.gguf_reader import GgufCheckpoint
from engine.checkpoints.hf import HfCheckpoint

MAX_BYTES = 256 << 30
REMEMBER_NOTHING = DigestCache(None)


def open_checkpoint(path: Path, max_bytes: int = MAX_BYTES, digests: DigestCache = REMEMBER_NOTHING) -> Checkpoint:
    """Raises CheckpointError, also when the weight files have more than `max_bytes`. The caller closes it."""
    try:
        return _open(path, max_bytes, digests)
    except OSError as error:  # a directory that may not be looked into, for example
        raise CheckpointError(f"{error.filename or path}: {error.strerror or error}") from None


def _open(path: Path, max_bytes: int, digests: DigestCache) -> Checkpoint:
    if path.suffix != ".gguf":
        return HfCheckpoint(path, max_bytes, digests)
    return GgufCheckpoint(path, max_bytes, digests)
