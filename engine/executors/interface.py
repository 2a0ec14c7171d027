"""What the runtime asks of an executor, whichever kernels it is made of.

An executor computes logits for rows of tokens. The contract that everything else rests on: **the logits of a token
depend only on the tokens before it**, bit for bit. Not on which other sequences share the step, how the prompt was cut
into steps, which pages hold its keys and values, whether those were computed here or loaded, or how many threads run.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]


class Wants(enum.Enum):
    """Which rows of a span need logits."""

    NONE = "none"
    LAST = "last"
    ALL = "all"


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive tokens of one sequence at positions start, start + 1, …; at most one span per sequence and step.

    The keys and values of positions 0 … start - 1 are in `pages` already. Pages may be shared between sequences; a
    shared page is only ever read: all its positions are below `start`.
    """

    token_ids: Sequence[int]
    """One or more; they need not stay inside one page."""
    start: int
    pages: Sequence[int]
    """Physical page of each block of `block_tokens` positions; covers start + len(token_ids) positions at least."""
    wants: Wants


class Executor(Protocol):
    """Not safe for concurrent use: one thread owns it."""

    @property
    def block_tokens(self) -> int:
        """Positions per page."""

    @property
    def page_bytes(self) -> int:
        """Size of an exported page: keys and values of all layers."""

    @property
    def page_count(self) -> int:
        """Physical pages 0 … page_count - 1, allocated when the executor was made."""

    @property
    def vocab_size(self) -> int:
        """Length of a row of logits."""

    @property
    def max_rows(self) -> int:
        """Most tokens one step may have, over all its spans."""

    @property
    def weight_bytes(self) -> int:
        """Memory the weights take."""

    def step(self, spans: Sequence[Span]) -> list[F32 | None]:
        """Runs all spans at once and writes their keys and values into their pages.

        Per span: logits [rows wanted, vocab_size] in float32, or None when none are. The arrays are valid until the
        next step.
        """

    def read_page(self, page: int) -> bytes:
        """The page's keys and values, in this executor's own layout."""

    def write_page(self, page: int, payload: bytes) -> None:
        """Fills a page with what `read_page` gave. Raises ValueError when the size is wrong."""
