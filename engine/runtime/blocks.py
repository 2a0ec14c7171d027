"""The worker's own store of key-value blocks by content hash: what it computed or fetched lately, bounded in bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence


class BlockStore:
    """LRU by bytes. Safe for use from the step thread and the event loop."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._blocks: OrderedDict[bytes, bytes] = OrderedDict()
        self._used = 0
        self._added: dict[bytes, None] = {}
        self._removed: dict[bytes, None] = {}
        self._lock = threading.Lock()

    @property
    def used_bytes(self) -> int:
        return self._used

    def put(self, block_hash: bytes, payload: bytes) -> bool:
        """Stores a block, evicting the least recently used; False when it was there or is larger than the store."""
        if len(payload) > self.capacity_bytes:
            return False
        with self._lock:
            if block_hash in self._blocks:
                self._blocks.move_to_end(block_hash)
                return False
            self._blocks[block_hash] = payload
            self._used += len(payload)
            self._note(block_hash, self._added, self._removed)
            while self._used > self.capacity_bytes:
                gone, old = self._blocks.popitem(last=False)
                self._used -= len(old)
                self._note(gone, self._removed, self._added)
        return True

    def leading(self, hashes: Sequence[bytes]) -> list[bytes]:
        """Payloads of the longest run of `hashes`, from the first, that is stored."""
        found: list[bytes] = []
        with self._lock:
            for block_hash in hashes:
                payload = self._blocks.get(block_hash)
                if payload is None:
                    break
                found.append(payload)
            # The beginning becomes the youngest: a chain that loses its first block is of no use, its last is no loss.
            for block_hash in reversed(hashes[: len(found)]):
                self._blocks.move_to_end(block_hash)
        return found

    def changes(self, limit: int) -> tuple[list[bytes], list[bytes]]:
        """Hashes that came and went since the last call, at most `limit` of each; the rest waits for the next call."""
        with self._lock:
            return _take(self._added, limit), _take(self._removed, limit)

    def restate(self) -> None:
        """Makes `changes` report everything that is stored from the beginning (a new lease knows nothing)."""
        with self._lock:
            self._added = dict.fromkeys(self._blocks)
            self._removed.clear()

    @staticmethod
    def _note(block_hash: bytes, now: dict[bytes, None], opposite: dict[bytes, None]) -> None:
        """A block that came and went between two reports needs no report; so both dicts stay bounded."""
        if block_hash in opposite:
            del opposite[block_hash]
        else:
            now[block_hash] = None


def _take(source: dict[bytes, None], limit: int) -> list[bytes]:
    taken = list(source)[:limit]
    for block_hash in taken:
        del source[block_hash]
    return taken
