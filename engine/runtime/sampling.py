"""Draws the next token: filters in a fixed order, then one random number that depends only on (seed, choice, position).

The random number is a hash, not a stream, so a generation can be resumed at any position, on any worker, and goes on
exactly as it would have (counter-based random numbers: Salmon et al., SC'11).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Mask = npt.NDArray[np.uint32]

LOWEST_LOGPROB = -10_000.0
"""Stands for log 0 on the wire."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn; ranges are those of autoglm.type.v1.SamplingParams."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    choice: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    @property
    def is_plain(self) -> bool:
        """The best token wins and nothing moves the scores."""
        return (self.temperature == 0.0 or self.top_k == 1) and not self.logit_bias and not self.has_penalties

    @property
    def has_penalties(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0)


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Natural-log probabilities at one position, before temperature and filters. `top` is best first."""

    chosen: tuple[int, float]
    top: tuple[tuple[int, float], ...]


class TokenCounts:
    """Which tokens a sequence has seen and how often its output has each; grows by one token in O(1).

    `ids` are distinct tokens of prompt and output; `counts` says for each how often the output has it.
    """

    def __init__(self, prompt: Sequence[int] = (), output: Sequence[int] = ()) -> None:
        seen = np.unique(np.asarray([*prompt, *output], dtype=np.int64))
        self._places = {int(token): place for place, token in enumerate(seen)}
        self._size = len(seen)
        capacity = max(64, 2 * self._size)
        self._ids = np.zeros(capacity, dtype=np.int64)
        self._counts = np.zeros(capacity, dtype=np.float64)
        self._ids[: self._size] = seen
        for token in output:
            self._counts[self._places[token]] += 1.0

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        return self._ids[: self._size]

    @property
    def counts(self) -> F64:
        return self._counts[: self._size]

    def add(self, token: int) -> None:
        """One more token of the output."""
        place = self._places.get(token)
        if place is None:
            if self._size == len(self._ids):
                self._ids, self._counts = np.resize(self._ids, 2 * self._size), np.resize(self._counts, 2 * self._size)
            place = self._places[token] = self._size
            self._ids[place], self._counts[place] = token, 0.0
            self._size += 1
        self._counts[place] += 1.0


NOTHING_SEEN = TokenCounts()
"""For sequences without penalties, which need no counts."""


def draw(
    logits: F32,
    sampling: Sampling,
    seen: TokenCounts,
    position: int,
    allowed: Mask | None = None,
    banned: Collection[int] = (),
) -> int:
    """The token at output `position`, given `logits` [vocabulary]. Pure.

    `allowed` has one bit per token (bit i % 32 of word i // 32). `banned` tokens are left out as well, unless nothing
    else is allowed. Raises FloatingPointError when the logits are not numbers: any choice would be arbitrary.
    """
    if sampling.is_plain and allowed is None and not banned:
        # NaN and +inf win every argmax, so looking at the winner is enough.
        best = int(logits.argmax())
        _check(float(logits[best]))
        return best
    scores = logits.astype(np.float64)
    _check(float(scores.max()))
    if bias := sampling.logit_bias:
        scores[np.fromiter(bias, np.int64, len(bias))] += np.fromiter(bias.values(), np.float64, len(bias))
    if sampling.has_penalties:
        _penalise(scores, sampling, seen)
    if allowed is not None or banned:
        _exclude(scores, allowed, banned)
    if sampling.temperature == 0.0 or sampling.top_k == 1:
        return int(np.argmax(scores))
    # Stable sort: equal scores stay in order of id, on every machine.
    order = _best(scores, sampling.top_k or len(scores))
    ranked = scores[order] / sampling.temperature
    weights = np.exp(ranked - ranked[0])
    keep = int(np.count_nonzero(weights)) if allowed is not None or banned else len(weights)
    if sampling.min_p > 0.0:
        keep = min(keep, int(np.count_nonzero(weights >= sampling.min_p)))
    total = np.cumsum(weights)
    if sampling.top_p < 1.0:
        keep = min(keep, int(np.searchsorted(total, sampling.top_p * total[-1])) + 1)
    keep = max(keep, 1)
    aim = uniform(sampling.seed, sampling.choice, position) * total[keep - 1]
    return int(order[min(int(np.searchsorted(total[:keep], aim, side="right")), keep - 1)])


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, the same for the same arguments everywhere."""
    data = seed.to_bytes(8, "little") + choice.to_bytes(4, "little") + position.to_bytes(8, "little")
    digest = hashlib.blake2b(data, digest_size=8, person=b"autoglm-sample").digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def logprobs_of(logits: F32, token: int, top: int) -> Logprobs:
    """Log-probability of `token` and of the `top` most likely tokens (ties by id).

    Raises FloatingPointError when the logits are not numbers.
    """
    wide = logits.astype(np.float64)
    peak = wide.max()
    _check(float(peak))
    normaliser = peak + np.log(np.exp(wide - peak).sum())
    best = _best(wide, top) if top else ()
    return Logprobs(
        chosen=(token, _finite(wide[token] - normaliser)),
        top=tuple((int(index), _finite(wide[index] - normaliser)) for index in best),
    )


def _check(peak: float) -> None:
    if not math.isfinite(peak):
        raise FloatingPointError("the model's logits are not finite")


def _exclude(scores: F64, allowed: Mask | None, banned: Collection[int]) -> None:
    """Gives what may not be drawn the score -inf."""
    if allowed is not None:
        bits = np.unpackbits(allowed.view(np.uint8), count=len(scores), bitorder="little")
        scores[bits == 0] = -np.inf
        if scores.max() == -np.inf:
            raise ValueError("the constraint allows no token")
    if banned:
        places = np.fromiter(banned, np.int64, len(banned))
        kept = scores[places]
        scores[places] = -np.inf
        if scores.max() == -np.inf:  # the constraint is fulfilled and only the end remains
            scores[places] = kept


def _best(scores: F64, count: int) -> npt.NDArray[np.intp]:
    """Ids of the `count` highest scores, best first, ties by id. Sorts only those: vocabularies are large."""
    if count < len(scores):
        least = np.partition(scores, len(scores) - count)[len(scores) - count]
        candidates = np.flatnonzero(scores >= least)
    else:
        candidates = np.arange(len(scores))
    return candidates[np.argsort(-scores[candidates], kind="stable")][:count]


def _finite(value: float) -> float:
    return float(min(0.0, max(LOWEST_LOGPROB, value)))


def _penalise(scores: F64, sampling: Sampling, seen: TokenCounts) -> None:
    """Repetition penalty (CTRL, arXiv 1909.05858) over prompt and output; presence and frequency over the output."""
    ids, counts = seen.ids, seen.counts
    values = scores[ids]
    if (factor := sampling.repetition_penalty) != 1.0:
        values = np.where(values > 0, values / factor, values * factor)
    if sampling.presence_penalty or sampling.frequency_penalty:
        values = values - np.where(counts > 0, sampling.presence_penalty + sampling.frequency_penalty * counts, 0.0)
    scores[ids] = values
