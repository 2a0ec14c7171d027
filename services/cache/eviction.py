"""Which blocks leave a full tier: segmented LRU that takes the end of a prompt before its beginning.

New blocks enter *probation*; a block that is fetched again moves to *protected*, which holds at most a fixed part of
the tier and hands its oldest back. Victims come from the old end of probation, then of protected. Within both, a block
always stands before (is evicted earlier than) its parent: chains are touched from their last block to their first, and
a new block is placed right before its parent. So what stays of a prompt is a prefix of it, the only part that is of
use. Pure bookkeeping, no clock and no randomness: the same calls give the same victims. See docs/decisions/0003.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from services.cache.blocks import BlockKey

PROTECTED_SHARE = 0.8
MAX_ANCESTORS = 8192
"""Links followed from one block; the longest prompt in blocks that the API accepts."""
MAX_TURNED_AWAY = 256
"""Ends of chains remembered as having found no place: one per call that is putting blocks."""


class Ring:
    """An ordered set with O(1) insertion anywhere, oldest first."""

    __slots__ = ("_next", "_previous")

    def __init__(self) -> None:
        self._next: dict[BlockKey | None, BlockKey | None] = {None: None}
        self._previous: dict[BlockKey | None, BlockKey | None] = {None: None}

    @property
    def first(self) -> BlockKey | None:
        return self._next[None]

    def insert(self, key: BlockKey, before: BlockKey | None = None) -> None:
        """Places `key` before another, or at the young end."""
        previous = self._previous[before]
        self._next[previous], self._previous[key] = key, previous
        self._next[key], self._previous[before] = before, key

    def remove(self, key: BlockKey) -> None:
        previous, following = self._previous.pop(key), self._next.pop(key)
        self._next[previous], self._previous[following] = following, previous

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._next

    def __len__(self) -> int:
        return len(self._next) - 1

    def __iter__(self) -> Iterator[BlockKey]:
        key = self._next[None]
        while key is not None:
            yield key
            key = self._next[key]


class _Order:
    """Probation and protected, for the whole tier or for one scope of it."""

    __slots__ = ("probation", "protected", "used_bytes")

    def __init__(self) -> None:
        self.probation, self.protected = Ring(), Ring()
        self.used_bytes = 0

    @property
    def victim(self) -> BlockKey | None:
        return self.probation.first or self.protected.first


@dataclass(slots=True)
class _Entry:
    size: int
    parent: BlockKey | None
    is_protected: bool = False


class Eviction:
    """The order of one tier. Each scope keeps its own beside the common one, so that it can be held to a share."""

    def __init__(self, capacity_bytes: int, scope_bytes: int) -> None:
        self.capacity_bytes, self.scope_bytes = capacity_bytes, min(scope_bytes, capacity_bytes)
        self._entries: dict[BlockKey, _Entry] = {}
        self._all = _Order()
        self._scopes: dict[bytes, _Order] = {}
        self._protected_bytes = 0
        self._turned_away: dict[BlockKey, bool] = {}

    @property
    def used_bytes(self) -> int:
        return self._all.used_bytes

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[BlockKey]:
        """Next victim first."""
        yield from self._all.probation
        yield from self._all.protected

    def fits(self, size: int) -> bool:
        """Whether a value of this size can be held at all."""
        return size <= self.scope_bytes

    def add(self, key: BlockKey, size: int, parent: BlockKey | None) -> list[BlockKey]:
        """Takes in a new key that `fits`; returns those that have to leave, perhaps `key` itself."""
        assert key not in self._entries and self.fits(size)
        if parent is not None and self._turned_away.pop(parent, False):
            # Its parent just found no place: what follows a lost block is of no use and must not displace others.
            self._turn_away(key)
            return [key]
        self._entries[key] = _Entry(size, parent)
        above = self._entries.get(parent) if parent is not None and parent != key else None
        before = parent if above is not None and not above.is_protected else None
        for order in self._orders(key):
            order.probation.insert(key, before)
            order.used_bytes += size
        victims = []
        while (mine := self._scopes[key.scope]).used_bytes > self.scope_bytes:
            victims.append(self._evict(mine.victim))
            if key.scope not in self._scopes:
                break
        while self.used_bytes > self.capacity_bytes:
            victims.append(self._evict(self._all.victim))
        if key not in self._entries:
            self._turn_away(key)
        return victims

    def remove(self, key: BlockKey) -> None:
        """Forgets a key, if it is there."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return
        if entry.is_protected:
            self._protected_bytes -= entry.size
        for order in self._orders(key):
            (order.protected if entry.is_protected else order.probation).remove(key)
            order.used_bytes -= entry.size
        if not self._scopes[key.scope].used_bytes:
            del self._scopes[key.scope]

    def touch(self, chain: Sequence[BlockKey], promote: bool) -> None:
        """Makes the chain (consecutive blocks of one prompt) and its ancestors young again; `promote` protects them."""
        parent: BlockKey | None = None
        for key in chain:
            entry = self._entries.get(key)
            if entry is not None and entry.parent is None and parent != key:
                entry.parent = parent
            parent = key
        present = [key for key in chain if key in self._entries]
        if not present:
            return
        for key in (*reversed(present), *self._ancestors(present[0])):
            self._renew(key, promote)
        while self._protected_bytes > PROTECTED_SHARE * self.capacity_bytes:
            oldest = self._all.protected.first
            assert oldest is not None
            self._move(oldest, to_protected=False)

    def _ancestors(self, key: BlockKey) -> list[BlockKey]:
        found: list[BlockKey] = []
        seen = {key}
        while len(found) < MAX_ANCESTORS:
            parent = self._entries[key].parent
            if parent is None or parent in seen or parent not in self._entries:
                break
            found.append(parent)
            seen.add(parent)
            key = parent
        return found

    def _renew(self, key: BlockKey, promote: bool) -> None:
        self._move(key, to_protected=promote or self._entries[key].is_protected)

    def _move(self, key: BlockKey, to_protected: bool) -> None:
        entry = self._entries[key]
        for order in self._orders(key):
            (order.protected if entry.is_protected else order.probation).remove(key)
            (order.protected if to_protected else order.probation).insert(key)
        self._protected_bytes += (to_protected - entry.is_protected) * entry.size
        entry.is_protected = to_protected

    def _turn_away(self, key: BlockKey) -> None:
        self._turned_away[key] = True
        while len(self._turned_away) > MAX_TURNED_AWAY:
            del self._turned_away[next(iter(self._turned_away))]

    def _evict(self, key: BlockKey | None) -> BlockKey:
        assert key is not None
        self.remove(key)
        return key

    def _orders(self, key: BlockKey) -> tuple[_Order, _Order]:
        return self._all, self._scopes.setdefault(key.scope, _Order())
