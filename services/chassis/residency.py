"""The region a request must stay in, carried from the incoming call to every outgoing one.

Only carried: where it may go is the mesh's policy (istio/clouds), which routes by this header and fails closed.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextvars import ContextVar

HEADER = "x-data-region"
MAX_LENGTH = 64

_region: ContextVar[str] = ContextVar("region", default="")


def start(region: str | None) -> None:
    """Remembers the incoming call's region for the current task; nothing means anywhere.

    One that is too long is cut: no region has such a name, so the mesh refuses it.
    """
    _region.set((region or "")[:MAX_LENGTH])


def of(metadata: Iterable[tuple[str, str | bytes]] | None) -> str:
    """The region that a call's metadata name."""
    return next((str(value) for key, value in metadata or () if key == HEADER), "")


def current() -> str:
    """The region of the current task."""
    return _region.get()
