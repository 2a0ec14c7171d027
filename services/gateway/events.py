"""What happens in a generation, in order and for several choices at once: more text, the end of a choice, the counts.

Made by `generation.py`; turned into gRPC messages by `server.py` and into JSON by `rest/render.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Reason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Alternative:
    """A token that could have been chosen."""

    token_id: int
    content: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenText:
    """One generated token: its bytes may be part of a character."""

    token_id: int
    content: bytes
    logprob: float | None = None
    top: tuple[Alternative, ...] = ()
    offset: int = 0  # where its text starts in the choice's text, in characters


@dataclass(frozen=True, slots=True)
class Delta:
    """More text of one choice, whole characters only; empty when only tokens are new."""

    variant_digest: str
    choice: int
    text: str
    tokens: tuple[TokenText, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of one choice."""

    variant_digest: str
    choice: int
    reason: Reason
    stop: str = ""  # the stop string that was met


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of all choices together; the last event. Each prompt counts once, however often it is answered."""

    variant_digest: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


Event: TypeAlias = Delta | Finished | Usage
