"""The pages of each running sequence: found by name, taken as it grows, named when whole, given back at the end.

The step loop's only way to key-value memory. A page that became whole is named at once, so a prompt that arrives in the
next step shares it; telling the outside world about it (which costs a copy) waits in a bounded queue until a step has
time.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from functools import partial

from engine.executors.interface import Executor
from engine.prefix import next_hash
from engine.runtime.pages import PagePool
from engine.runtime.sequences import Running

log = logging.getLogger("autoglm.engine")


class Residency:
    """Belongs to the step thread."""

    def __init__(self, executor: Executor, pool: PagePool) -> None:
        self._executor, self._pool = executor, pool
        self._block = executor.block_tokens
        self._unpublished: deque[tuple[bytes, Running]] = deque(maxlen=pool.page_count)

    @property
    def has_unpublished(self) -> bool:
        return bool(self._unpublished)

    def missing(self, sequence: Running) -> int:
        """Pages the sequence would have to take for all its tokens and one more, were it to begin now."""
        needed = len(sequence.tokens) // self._block + 1
        return needed - self._pool.in_use(self._names(sequence)[: self._usable(sequence)])

    def begin(self, sequence: Running) -> None:
        """Gives it the longest beginning that is here or was fetched; at least one token is left to compute."""
        assert not sequence.pages and not sequence.computed
        for name in self._names(sequence)[: self._usable(sequence)]:
            page = self._pool.share(name)
            if page is None:
                page = self._load(name, sequence)
            if page is None:
                break
            sequence.pages.append(page)
        sequence.named = len(sequence.pages)
        sequence.computed = sequence.named * self._block

    def grow(self, sequence: Running, tokens: int) -> int:
        """Takes pages for `tokens` positions; returns how many positions there are pages for now."""
        needed = -(-tokens // self._block)
        pages = sequence.pages
        while len(pages) < needed:
            page = self._pool.take()
            if page is None:
                break
            pages.append(page)
        return len(pages) * self._block

    def settle(self, sequence: Running) -> None:
        """Names the pages that became whole."""
        whole = sequence.computed // self._block
        if whole <= sequence.named:
            return
        if sequence.request.scope is None:
            sequence.named = whole
            return
        names = self._names(sequence)
        for index in range(sequence.named, whole):
            name = names[index]
            page = sequence.pages[index]
            is_new = self._pool.page_of(name) is None
            sequence.pages[index] = self._pool.name(page, name)
            sequence.named = index + 1
            if is_new and sequence.publishes:
                self._unpublished.append((name, sequence))

    def release(self, sequence: Running) -> None:
        """Gives all its pages back; those with a name are kept as long as nobody else needs the room."""
        pages, sequence.pages = sequence.pages, []
        sequence.computed = sequence.named = 0
        self._pool.release(pages)

    def publish(self, most: int) -> None:
        """Hands on at most `most` new blocks; one that is gone by now is not handed on."""
        while self._unpublished and most > 0:
            name, sequence = self._unpublished.popleft()
            on_block, page = sequence.request.on_block, self._pool.page_of(name)
            if page is None or on_block is None or not sequence.publishes:
                continue
            most -= 1
            try:
                on_block(name, partial(self._executor.read_page, page))
            except Exception:
                log.exception("a block could not be handed on; the request goes on and keeps the rest to itself")
                sequence.publishes = False

    def _usable(self, sequence: Running) -> int:
        return (len(sequence.tokens) - 1) // self._block

    def _names(self, sequence: Running) -> Sequence[bytes]:
        """Names of its whole blocks of tokens known so far, continued from the last one known."""
        scope = sequence.request.scope
        if scope is None:
            return ()
        names, tokens, block = sequence.names, sequence.tokens, self._block
        for index in range(len(names), len(tokens) // block):
            names.append(next_hash(names[-1] if names else scope, tokens[index * block : (index + 1) * block]))
        return names

    def _load(self, name: bytes, sequence: Running) -> int | None:
        payload = sequence.request.prefix_blocks.get(name)
        if payload is None or (page := self._pool.take()) is None:
            return None
        try:
            self._executor.write_page(page, payload)
        except Exception as error:
            self._pool.release([page])
            if not isinstance(error, ValueError):
                raise
            log.warning("a cached block was unusable and is recomputed: %s", error)
            return None
        return self._pool.name(page, name)
