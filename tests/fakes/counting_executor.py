"""An executor without mathematics: the next token is a hash of all tokens so far. It counts what it is asked."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np

from engine.executors.interface import F32, Span

VOCABULARY = 97
BLOCK = 4


class CountingCache:
    """Remembers the tokens themselves as 'keys and values'."""

    def __init__(self, capacity: int) -> None:
        self.tokens: list[int] = []
        self.capacity = capacity

    @property
    def length(self) -> int:
        return len(self.tokens)

    def export_block(self, index: int) -> bytes:
        return bytes(self.tokens[index * BLOCK : (index + 1) * BLOCK])

    def import_block(self, payload: bytes) -> None:
        if len(payload) != BLOCK:
            raise ValueError("wrong size")
        self.tokens += payload


class CountingExecutor:
    """Implements `engine.executors.interface.Executor`. `before_step` runs first and may block or raise."""

    def __init__(self, before_step: Callable[[], None] = lambda: None) -> None:
        self.computed_tokens = 0
        self.steps: list[int] = []
        self.before_step = before_step
        self.stepped = threading.Semaphore(0)

    block_tokens = BLOCK
    block_bytes = BLOCK

    def new_cache(self, capacity_tokens: int) -> CountingCache:
        return CountingCache(capacity_tokens)

    def step(self, spans: Sequence[Span]) -> list[F32 | None]:
        self.before_step()
        results: list[F32 | None] = []
        for span in spans:
            cache = span.cache
            assert isinstance(cache, CountingCache)
            rows = []
            for token in span.token_ids:
                assert len(cache.tokens) < cache.capacity
                cache.tokens.append(token)
                rows.append(one_hot(next_token(cache.tokens)))
            self.computed_tokens += len(span.token_ids)
            results.append(np.stack(rows) if span.wants_logits else None)
        self.steps.append(sum(len(span.token_ids) for span in spans))
        self.stepped.release()
        return results


def next_token(tokens: Sequence[int]) -> int:
    """What this executor says comes after `tokens`."""
    value = 7
    for token in tokens:
        value = (value * 31 + token + 1) % 1_000_003
    return value % VOCABULARY


def one_hot(token: int) -> F32:
    row = np.zeros(VOCABULARY, dtype=np.float32)
    row[token] = 50.0
    return row
