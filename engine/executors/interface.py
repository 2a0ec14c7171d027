"""What the runtime asks of an executor, whichever kernels it is made of.

An executor computes logits for rows of tokens. The contract that everything else rests on: **the logits of a token
depend only on the tokens before it**, bit for bit. Not on which other sequences share the step, not on how the prompt
was cut into steps, not on whether the keys and values of its prefix were computed here or loaded from a cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]


class SequenceCache(Protocol):
    """Keys and values of one sequence."""

    @property
    def length(self) -> int:
        """Tokens whose keys and values are present."""

    def export_block(self, index: int) -> bytes:
        """Keys and values of whole block `index`, in this executor's layout."""

    def import_block(self, payload: bytes) -> None:
        """Appends one block that `export_block` made. Raises ValueError when the size is wrong."""


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive tokens of one sequence, all inside one aligned block of `block_tokens` positions.

    They are placed at positions cache.length …, and become part of the cache; spans of one sequence may follow each
    other in a step. `wants_logits` asks for the logits
    after every token of the span, otherwise only bookkeeping is done.
    """

    cache: SequenceCache
    token_ids: Sequence[int]
    wants_logits: bool


class Executor(Protocol):
    """Not safe for concurrent use: one thread owns it."""

    @property
    def block_tokens(self) -> int:
        """Positions per key-value block."""

    @property
    def block_bytes(self) -> int:
        """Size of an exported block."""

    def new_cache(self, capacity_tokens: int) -> SequenceCache:
        """An empty cache that will never hold more than `capacity_tokens`."""

    def step(self, spans: Sequence[Span]) -> list[F32 | None]:
        """Runs all spans at once. Per span: logits [tokens, vocabulary] in float32, or None when not wanted."""
