"""Runs blocking or heavy work in a bounded pool of threads, so that the event loop keeps turning.

More than `max_waiting` calls beyond the busy threads are refused with TooBusy: a queue that may grow without end only
turns overload into lateness.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from services.chassis.errors import TooBusy

P = ParamSpec("P")
T = TypeVar("T")

RETRY_AFTER_S = 0.1


class Offload:
    """A pool of `threads` with a waiting room for `max_waiting` more."""

    def __init__(self, name: str, threads: int, max_waiting: int) -> None:
        self._name, self._limit = name, threads + max_waiting
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._lock = threading.Lock()
        self._accepted = 0

    async def __call__(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of `work` in a thread. A cancelled caller stops waiting; work that has begun runs to its end."""
        with self._lock:
            if self._accepted >= self._limit:
                raise TooBusy(f"{self._name}: all {self._limit} places are taken", RETRY_AFTER_S, limit=self._limit)
            self._accepted += 1
        context = contextvars.copy_context()
        try:
            future = self._pool.submit(lambda: context.run(work, *args, **kwargs))
        except RuntimeError:  # closed
            self._done(None)
            raise
        future.add_done_callback(self._done)
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Ends the threads after what they are doing; what still waits is dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _done(self, _: object) -> None:
        with self._lock:
            self._accepted -= 1
