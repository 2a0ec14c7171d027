"""Draws the next token: filters in a fixed order, then one random number that depends only on (seed, choice, position).

The random number is a hash, not a stream, so a generation can be resumed at any position, on any worker, and goes on
exactly as it would have (counter-based random numbers: Salmon et al., SC'11).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

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


def draw(logits: F32, sampling: Sampling, prompt: Sequence[int], output: Sequence[int]) -> int:
    """The next token id after `prompt + output`, given `logits` [vocabulary]. Pure."""
    scores = logits.astype(np.float64)
    if bias := sampling.logit_bias:
        scores[np.fromiter(bias, np.int64, len(bias))] += np.fromiter(bias.values(), np.float64, len(bias))
    if sampling.has_penalties:
        _penalise(scores, sampling, prompt, output)
    if sampling.temperature == 0.0 or sampling.top_k == 1:
        return int(np.argmax(scores))
    # Stable sort: equal scores stay in order of id, on every machine.
    order = _best(scores, sampling.top_k or len(scores))
    ranked = scores[order] / sampling.temperature
    weights = np.exp(ranked - ranked[0])
    keep = len(weights)
    if sampling.min_p > 0.0:
        keep = min(keep, int(np.count_nonzero(weights >= sampling.min_p)))
    total = np.cumsum(weights)
    if sampling.top_p < 1.0:
        keep = min(keep, int(np.searchsorted(total, sampling.top_p * total[-1])) + 1)
    keep = max(keep, 1)
    aim = uniform(sampling.seed, sampling.choice, len(output)) * total[keep - 1]
    return int(order[min(int(np.searchsorted(total[:keep], aim, side="right")), keep - 1)])


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, the same for the same arguments everywhere."""
    data = seed.to_bytes(8, "little") + choice.to_bytes(4, "little") + position.to_bytes(8, "little")
    digest = hashlib.blake2b(data, digest_size=8, person=b"autoglm-sample").digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def logprobs_of(logits: F32, token: int, top: int) -> Logprobs:
    """Log-probability of `token` and of the `top` most likely tokens (ties by id)."""
    wide = logits.astype(np.float64)
    peak = wide.max()
    normaliser = peak + np.log(np.exp(wide - peak).sum())
    best = _best(wide, top) if top else ()
    return Logprobs(
        chosen=(token, _finite(wide[token] - normaliser)),
        top=tuple((int(index), _finite(wide[index] - normaliser)) for index in best),
    )


def is_sound(logits: F32) -> bool:
    """Whether tokens can be drawn from these: with a NaN or an infinity every choice would be arbitrary."""
    return bool(np.isfinite(logits).all())


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


def _penalise(scores: F64, sampling: Sampling, prompt: Sequence[int], output: Sequence[int]) -> None:
    """Repetition penalty (CTRL, arXiv 1909.05858) over prompt and output; presence and frequency over the output."""
    if sampling.repetition_penalty != 1.0:
        seen = np.unique(np.asarray([*prompt, *output], dtype=np.int64))
        factor = sampling.repetition_penalty
        scores[seen] = np.where(scores[seen] > 0, scores[seen] / factor, scores[seen] * factor)
    if output and (sampling.presence_penalty or sampling.frequency_penalty):
        written, counts = np.unique(np.asarray(output, dtype=np.int64), return_counts=True)
        scores[written] -= sampling.presence_penalty + sampling.frequency_penalty * counts
