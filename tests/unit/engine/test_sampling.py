"""The sampler: reproducible, within its filters, and distributed as it should be."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.runtime.sampling import LOWEST_LOGPROB, NOTHING_SEEN, Sampling, TokenCounts, draw, logprobs_of, uniform


def logits(*values: float) -> np.ndarray:
    return np.asarray(values, dtype=np.float32)


def test_temperature_zero_takes_the_best_and_the_lowest_id_on_ties() -> None:
    """Greedy is argmax; equal logits go to the smaller id."""
    assert draw(logits(1, 5, 5, 2), Sampling(temperature=0), NOTHING_SEEN, 0) == 1


def test_the_same_seed_and_position_draw_the_same_token() -> None:
    """A draw depends on seed, choice and position, not on what was drawn before elsewhere."""
    scores = logits(*np.linspace(0, 1, 50))
    first = [draw(scores, Sampling(seed=9), NOTHING_SEEN, position) for position in range(20)]
    again = [draw(scores, Sampling(seed=9), TokenCounts([1, 2, 3], [7] * position), position) for position in range(20)]
    other = [draw(scores, Sampling(seed=9, choice=1), NOTHING_SEEN, position) for position in range(20)]
    assert first == again and first != other


@given(
    st.lists(st.floats(-30, 30), min_size=2, max_size=40),
    st.floats(0.05, 3),
    st.floats(0, 1),
    st.integers(0, 10),
    st.floats(0, 1),
    st.integers(0, 2**63 - 1),
)
def test_a_draw_stays_inside_its_filters(
    values: list[float], temperature: float, top_p: float, top_k: int, min_p: float, seed: int
) -> None:
    """Whatever the settings: a valid id, among the top k, above min-p, inside the nucleus."""
    scores = logits(*values)
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed)
    token = draw(scores, sampling, NOTHING_SEEN, 0)
    better = int(np.count_nonzero(scores > scores[token]))
    assert 0 <= token < len(values)
    assert top_k == 0 or better < top_k
    weights = np.exp((scores.astype(np.float64) - float(scores.max())) / temperature)
    assert better == 0 or weights[token] >= min_p * (1 - 1e-9)
    above = weights[scores > scores[token]].sum()
    assert better == 0 or above <= top_p * weights.sum() * (1 + 1e-9)


def test_draws_follow_the_distribution() -> None:
    """Over 4,000 positions the frequencies match the softmax (chi-square, 3 degrees of freedom, p > 0.001)."""
    scores = logits(0.0, 1.0, 2.0, 0.5)
    expected = np.exp(scores) / np.exp(scores).sum()
    counts = np.bincount([draw(scores, Sampling(seed=1), NOTHING_SEEN, n) for n in range(4000)], minlength=4)
    chi_square = float((((counts - 4000 * expected) ** 2) / (4000 * expected)).sum())
    assert chi_square < 16.27


def test_penalties_and_bias_move_the_choice() -> None:
    """Presence, frequency, repetition and bias act on the tokens they name."""
    scores = logits(3.0, 2.9, 0.0)
    greedy = {"temperature": 0.0}
    assert draw(scores, Sampling(presence_penalty=0.2, **greedy), TokenCounts([], [0]), 0) == 1
    assert draw(scores, Sampling(frequency_penalty=0.06, **greedy), TokenCounts([], [0]), 0) == 0
    assert draw(scores, Sampling(frequency_penalty=0.06, **greedy), TokenCounts([], [0, 0]), 0) == 1
    assert draw(scores, Sampling(repetition_penalty=1.1, **greedy), TokenCounts([0], []), 0) == 1
    assert draw(scores, Sampling(logit_bias={2: 50.0}, **greedy), TokenCounts([], []), 0) == 2
    assert draw(scores, Sampling(presence_penalty=0.2, **greedy), TokenCounts([0], []), 0) == 0, (
        "the prompt is not output"
    )


def test_logprobs_are_of_the_raw_distribution() -> None:
    """Log-probabilities sum to one over the vocabulary and are clipped to the wire's lowest value."""
    entry = logprobs_of(logits(0.0, 1.0, 2.0), 0, 3)
    assert math.isclose(sum(math.exp(value) for _, value in entry.top), 1.0, rel_tol=1e-6)
    assert [token for token, _ in entry.top] == [2, 1, 0] and entry.chosen == entry.top[2]
    assert logprobs_of(logits(0.0, -1e9), 1, 0).chosen == (1, LOWEST_LOGPROB)


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_uniform_is_in_range(seed: int) -> None:
    """Random numbers are in [0, 1) and differ by position."""
    numbers = [uniform(seed, 0, position) for position in range(100)]
    assert all(0 <= number < 1 for number in numbers) and len(set(numbers)) == 100
