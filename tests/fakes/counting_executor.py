"""An executor without mathematics: the next token is a hash of all tokens so far. It counts what it is asked.

A page remembers the tokens that were written into it and the hash before and after each, so a page table that is wrong,
a page that someone else has overwritten, or a position that was never computed is an assertion, not a wrong token.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Sequence

import numpy as np

from engine.executors.interface import F32, Span, Wants

VOCABULARY = 97
BLOCK = 4
START = 7


class CountingExecutor:
    """Implements `engine.executors.interface.Executor`. `before_step` runs first and may block or raise.

    `follow` makes the next token from the hash of all tokens and the last of them.
    """

    block_tokens = BLOCK
    page_bytes = 4 + BLOCK
    vocab_size = VOCABULARY
    weight_bytes = 0

    def __init__(
        self,
        before_step: Callable[[], None] = lambda: None,
        page_count: int = 300_000,
        max_rows: int = 4096,
        follow: Callable[[int, int], int] = lambda value, _: value % VOCABULARY,
    ) -> None:
        self.page_count, self.max_rows = page_count, max_rows
        self.computed_tokens = 0
        self.steps: list[int] = []
        self.before_step, self.follow = before_step, follow
        self.stepped = threading.Semaphore(0)
        self.reads = 0
        self._pages: dict[int, tuple[int, list[int], list[int]]] = {}

    def step(self, spans: Sequence[Span]) -> list[F32 | None]:
        self.before_step()
        self._check(spans)
        results: list[F32 | None] = []
        for span in spans:
            value, rows = self._before(span), []
            for position, token in enumerate(span.token_ids, span.start):
                page, slot = span.pages[position // BLOCK], position % BLOCK
                if slot == 0:
                    self._pages[page] = (value, [], [])
                before, tokens, values = self._pages[page]
                value = hash_after(value, token)
                self._pages[page] = (before, [*tokens[:slot], token], [*values[:slot], value])
                rows.append(one_hot(self.follow(value, token)))
            self.computed_tokens += len(span.token_ids)
            wanted = {Wants.NONE: [], Wants.LAST: rows[-1:], Wants.ALL: rows}[span.wants]
            results.append(np.stack(wanted) if wanted else None)
        self.steps.append(sum(len(span.token_ids) for span in spans))
        self.stepped.release()
        return results

    def read_page(self, page: int) -> bytes:
        self.reads += 1
        before, tokens, _ = self._pages[page]
        assert len(tokens) == BLOCK, "only whole pages are handed on"
        return struct.pack("<I", before) + bytes(tokens)

    def write_page(self, page: int, payload: bytes) -> None:
        if len(payload) != self.page_bytes:
            raise ValueError("wrong size")
        (before,), tokens = struct.unpack("<I", payload[:4]), list(payload[4:])
        values, value = [], before
        for token in tokens:
            value = hash_after(value, token)
            values.append(value)
        self._pages[page] = (before, tokens, values)

    def _check(self, spans: Sequence[Span]) -> None:
        rows = sum(len(span.token_ids) for span in spans)
        assert 1 <= rows <= self.max_rows, f"{rows} rows in one step"
        readers: dict[int, int] = {}
        for span in spans:
            assert span.token_ids and span.start >= 0
            assert all(0 <= page < self.page_count for page in span.pages)
            assert len(set(span.pages)) == len(span.pages), "a page twice in one sequence"
            assert len(span.pages) * BLOCK >= span.start + len(span.token_ids), "positions without a page"
            for page in span.pages:
                readers[page] = readers.get(page, 0) + 1
        for span in spans:
            for block in range(span.start // BLOCK, (span.start + len(span.token_ids) - 1) // BLOCK + 1):
                assert readers[span.pages[block]] == 1, "a page that others read is written"

    def _before(self, span: Span) -> int:
        """The hash of the tokens before the span, read from its pages."""
        value = START
        for block in range(-(-span.start // BLOCK)):
            length = min(BLOCK, span.start - block * BLOCK)
            before, tokens, values = self._pages[span.pages[block]]
            assert before == value, "the page belongs to another text"
            assert len(tokens) >= length, "a position that was never computed"
            value = values[length - 1]
        return value


def hash_after(value: int, token: int) -> int:
    return (value * 31 + token + 1) % 1_000_003


def next_token(tokens: Sequence[int]) -> int:
    """What this executor says comes after `tokens`."""
    value = START
    for token in tokens:
        value = hash_after(value, token)
    return value % VOCABULARY


def payload_of(tokens: Sequence[int], block: int) -> bytes:
    """What `read_page` gives for a whole block of `tokens`."""
    value = START
    for token in tokens[: block * BLOCK]:
        value = hash_after(value, token)
    return struct.pack("<I", value) + bytes(tokens[block * BLOCK : (block + 1) * BLOCK])


def one_hot(token: int) -> F32:
    row = np.zeros(VOCABULARY, dtype=np.float32)
    row[token] = 50.0
    return row
