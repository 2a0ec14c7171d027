"""Draws the next token: filters in a fixed order, then one random number that depends only on (seed, choice, position).

The random number is a hash, not a stream, so a generation can be resumed at any position, on any worker, and goes on
exactly as it would have (counter-based random numbers: Salmon et al., SC'11).
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import autoglm_kernels as kernels
import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
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
        seen = np.unique(np.asarray([*prompt, *output], dtype=np.int32))
        self._places = {int(token): place for place, token in enumerate(seen)}
        self._size = len(seen)
        capacity = max(64, 2 * self._size)
        self._ids = np.zeros(capacity, dtype=np.int32)
        self._counts = np.zeros(capacity, dtype=np.int32)
        self._ids[: self._size] = seen
        for token in output:
            self._counts[self._places[token]] += 1

    @property
    def ids(self) -> I32:
        return self._ids[: self._size]

    @property
    def counts(self) -> I32:
        return self._counts[: self._size]

    def add(self, token: int) -> None:
        """One more token of the output."""
        place = self._places.get(token)
        if place is None:
            if self._size == len(self._ids):
                self._ids, self._counts = np.resize(self._ids, 2 * self._size), np.resize(self._counts, 2 * self._size)
            place = self._places[token] = self._size
            self._ids[place], self._counts[place] = token, 0
            self._size += 1
        self._counts[place] += 1


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
    """The token at output `position`, given `logits` [vocabulary]. Pure, and the same on every CPU.

    `allowed` has one bit per token (bit i % 32 of word i // 32). `banned` tokens are left out as well, unless nothing
    else is allowed. Raises FloatingPointError when the logits are not numbers: any choice would be arbitrary.
    """
    if banned:
        fewer = without(banned, len(logits), allowed)
        token = _draw(logits, sampling, seen, position, fewer)
        if token != NOTHING_ALLOWED:
            return token  # otherwise the constraint is fulfilled and only the end remains
    token = _draw(logits, sampling, seen, position, allowed)
    if token == NOTHING_ALLOWED:
        raise ValueError("the constraint allows no token")
    return token


NOTHING_ALLOWED = -2
NOT_FINITE = -1
_sampler = threading.local()


def _native() -> kernels.Sampler:
    """One sampler per thread, for it has working memory."""
    if not hasattr(_sampler, "it"):
        _sampler.it = kernels.Sampler(kernels.Device())
    found: kernels.Sampler = _sampler.it
    return found


def _draw(logits: F32, sampling: Sampling, seen: TokenCounts, position: int, allowed: Mask | None) -> int:
    bias = sampling.logit_bias
    penalises = sampling.has_penalties
    token: int = _native().draw(
        logits,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        top_k=sampling.top_k,
        uniform=0.0 if sampling.temperature == 0.0 else uniform(sampling.seed, sampling.choice, position),
        bias_ids=np.fromiter(bias, np.int32, len(bias)) if bias else None,
        bias=np.fromiter(bias.values(), np.float32, len(bias)) if bias else None,
        seen_ids=seen.ids if penalises else None,
        seen_output=seen.counts if penalises else None,
        repetition=sampling.repetition_penalty,
        presence=sampling.presence_penalty,
        frequency=sampling.frequency_penalty,
        allowed=allowed,
    )
    if token == NOT_FINITE:
        raise FloatingPointError("the model's logits are not finite")
    return token


def without(banned: Collection[int], size: int, allowed: Mask | None = None) -> Mask:
    """The bits of `allowed`, all of `size` by default, but for those of `banned`."""
    words = -(-size // 32)
    mask = np.full(words, 0xFFFFFFFF, np.uint32) if allowed is None else allowed.copy()
    for token in banned:
        mask[token // 32] &= ~np.uint32(1 << (token % 32))
    return mask


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, the same for the same arguments everywhere."""
    data = seed.to_bytes(8, "little") + choice.to_bytes(4, "little") + position.to_bytes(8, "little")
    digest = hashlib.blake2b(data, digest_size=8, person=b"autoglm-sample").digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def logprobs_of(logits: F32, token: int, top: int) -> Logprobs:
    """Log-probability of `token` and of the `top` most likely tokens (ties by id).

    Raises FloatingPointError when the logits are not numbers.
    """
    try:
        chosen, best = _native().logprobs(logits, token, top)
    except ArithmeticError:
        raise FloatingPointError("the model's logits are not finite") from None
    return Logprobs(chosen=(token, chosen), top=tuple(best))
