"""The events of a stream, in the order a caller meets them: deltas, one finish per choice, then one done.

for event in stream:
    match event:
        case Delta(text=text): print(text, end="")
        case Finish(reason=reason): ...
        case Done(usage=usage): ...
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from autoglm.completion import FinishReason, Token, Usage


@dataclass(frozen=True, slots=True)
class Delta:
    """More text of one choice, in whole characters. May be empty when only log-probabilities are new."""

    text: str
    choice: int = 0
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True, slots=True)
class Finish:
    """The end of one choice. `stop` is the stop string that was met, if one was."""

    reason: FinishReason
    choice: int = 0
    stop: str | None = None


@dataclass(frozen=True, slots=True)
class Done:
    """The proper end of the stream: every choice has finished and the call ended well. Always the last event."""

    usage: Usage
    request_id: str
    trace_id: str
    variant_digest: str


Event: TypeAlias = Delta | Finish | Done
