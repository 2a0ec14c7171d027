"""What the gateway asks of a worker and hears from it, in token ids. `clients.py` puts it on the wire."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from services.gateway.events import Reason
from services.gateway.requests import Constraint, Sampling


@dataclass(frozen=True, slots=True)
class Work:
    """One choice to generate."""

    request_id: str
    model: str
    token_ids: tuple[int, ...]
    sampling: Sampling
    max_tokens: int
    choice_index: int
    tenant: str
    ignore_eos: bool = False
    logprobs: bool = False
    top_logprobs: int = 0
    min_tokens: int = 0
    constraint: Constraint | None = None


@dataclass(frozen=True, slots=True)
class Scored:
    """Log-probabilities at one position: of the chosen token and of the likeliest ones, best first."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Tokens:
    """New tokens; `scores` has one entry per token when log-probabilities were asked for."""

    variant_digest: str
    token_ids: tuple[int, ...]
    scores: tuple[Scored, ...]
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class End:
    """The worker's own end of the stream."""

    variant_digest: str
    reason: Reason
    cached_tokens: int
    completion_tokens: int


Part: TypeAlias = Tokens | End


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt as ids, and the hash of the tokenizer that made them."""

    token_ids: tuple[int, ...]
    tokenizer_digest: str
