"""Who holds which page of the executor's key-value memory: reference counts, names, and a cache of finished prefixes.

A page is free, in use (one or more sequences refer to it), or kept: no one refers to it, but it has a name (the chained
hash of all tokens up to its end, `engine.prefix`), so the next prompt with that beginning finds it. Kept pages are
given away again when free ones run out, the least recently used first. It knows nothing of what pages contain.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence


class PagePool:
    """Changed by the step thread only; `held`, `changes`, `restate` and the counts may be asked from any thread."""

    def __init__(self, page_count: int) -> None:
        self.page_count = page_count
        self._free = list(range(page_count - 1, -1, -1))
        self._references = [0] * page_count
        self._names: list[bytes | None] = [None] * page_count
        self._pages: dict[bytes, int] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._added: dict[bytes, None] = {}
        self._removed: dict[bytes, None] = {}
        self._lock = threading.Lock()

    @property
    def used(self) -> int:
        """Pages that sequences refer to."""
        return self.page_count - len(self._free) - len(self._kept)

    @property
    def kept(self) -> int:
        """Pages that only their name keeps."""
        return len(self._kept)

    @property
    def available(self) -> int:
        """Pages that `take` can give."""
        return len(self._free) + len(self._kept)

    def take(self) -> int | None:
        """A page of the caller's own, or None when all are in use."""
        with self._lock:
            if self._free:
                page = self._free.pop()
            elif self._kept:
                page, _ = self._kept.popitem(last=False)
                self._forget(page)
            else:
                return None
            self._references[page] = 1
            return page

    def share(self, name: bytes) -> int | None:
        """The page of this name, with one reference more; None when there is none."""
        with self._lock:
            page = self._pages.get(name)
            if page is not None:
                if self._references[page] == 0:
                    del self._kept[page]
                self._references[page] += 1
            return page

    def name(self, page: int, name: bytes) -> int:
        """Makes a whole page findable. Returns the page to use from here on: when another has the name already, that
        one (its content is the same, to the bit), and `page` is given back."""
        with self._lock:
            known = self._pages.get(name)
            if known is None:
                self._names[page], self._pages[name] = name, page
                self._note(name, self._added, self._removed)
                return page
            if known != page:
                if self._references[known] == 0:
                    del self._kept[known]
                self._references[known] += 1
                self._drop(page)
            return known

    def release(self, pages: Sequence[int]) -> None:
        """One reference less to each. The last becomes the oldest: a chain without its first page is of no use."""
        with self._lock:
            for page in reversed(pages):
                self._drop(page)

    def references(self, page: int) -> int:
        return self._references[page]

    def page_of(self, name: bytes) -> int | None:
        """The page of this name, without a reference to it."""
        return self._pages.get(name)

    def held(self, names: Iterable[bytes]) -> int:
        """How many of `names`, from the first without a gap, are here now. They may be gone a moment later."""
        count = 0
        with self._lock:
            for name in names:
                if name not in self._pages:
                    break
                count += 1
        return count

    def in_use(self, names: Iterable[bytes]) -> int:
        """How many of `names`, from the first without a gap, some sequence refers to: sharing them takes no page."""
        count = 0
        with self._lock:
            for name in names:
                page = self._pages.get(name)
                if page is None or self._references[page] == 0:
                    break
                count += 1
        return count

    def changes(self, limit: int) -> tuple[list[bytes], list[bytes]]:
        """Names that came and went since the last call, at most `limit` of each; the rest waits for the next call."""
        with self._lock:
            return _first(self._added, limit), _first(self._removed, limit)

    def restate(self) -> None:
        """Makes `changes` report every name from the beginning (a new lease knows nothing)."""
        with self._lock:
            self._added = dict.fromkeys(self._pages)
            self._removed.clear()

    def _drop(self, page: int) -> None:
        assert self._references[page] > 0, f"page {page} was given back twice"
        self._references[page] -= 1
        if self._references[page] == 0:
            if self._names[page] is None:
                self._free.append(page)
            else:
                self._kept[page] = None

    def _forget(self, page: int) -> None:
        name = self._names[page]
        assert name is not None
        self._names[page] = None
        del self._pages[name]
        self._note(name, self._removed, self._added)

    @staticmethod
    def _note(name: bytes, now: dict[bytes, None], opposite: dict[bytes, None]) -> None:
        """A name that came and went between two reports needs no report; so both dicts stay bounded."""
        if name in opposite:
            del opposite[name]
        else:
            now[name] = None


def _first(source: dict[bytes, None], limit: int) -> list[bytes]:
    taken = list(source)[:limit]
    for name in taken:
        del source[name]
    return taken
