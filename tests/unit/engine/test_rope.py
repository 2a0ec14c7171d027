"""Rotary frequencies: the same bits on every CPU."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from engine.checkpoints.architecture import Architecture
from engine.checkpoints.hf_config import parse
from engine.checkpoints.rope import cos_sin_factor, inverse_frequencies, yarn_attention_factor

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}


def arch(**changes: object) -> Architecture:
    sizes = {
        "model_type": "llama", "vocab_size": 1000, "hidden_size": 1024, "intermediate_size": 512,
        "num_hidden_layers": 1, "num_attention_heads": 8, "max_position_embeddings": 131_072,
    }  # fmt: skip
    return parse(sizes | changes, Path("config.json"))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "46353041f801040e"),
        ({"rope_theta": 500_000.0, "rope_scaling": LLAMA3}, "236e5ce33f605afa"),
        ({"rope_theta": 1_000_000.0, "rope_scaling": YARN}, "44e80984213be945"),
        ({"rope_scaling": {"type": "linear", "factor": 3.0}, "head_dim": 80}, "1fe362f59c7c7ed7"),
    ],
    ids=["plain", "llama3", "yarn", "linear"],
)
def test_frequencies_have_the_same_bits_everywhere(changes: dict[str, object], expected: str) -> None:
    """Digests taken once: another CPU, C library or numpy must find the same ones."""
    values = inverse_frequencies(arch(**changes))
    assert values.dtype == np.float64 and np.array_equal(values, values.astype(np.float32))
    assert hashlib.sha256(values.astype("<f8").tobytes()).hexdigest()[:16] == expected


def test_plain_frequencies_are_powers_of_theta() -> None:
    """theta ** (-2 i / size), within a float32 step."""
    values = inverse_frequencies(arch())
    expected = 10_000.0 ** (-np.arange(0, 128, 2) / 128)
    assert values.shape == (64,) and np.allclose(values, expected, rtol=2.0**-22, atol=0)


def test_nothing_is_rotated_without_rotated_dimensions() -> None:
    """A partial_rotary_factor of 0 has no frequencies."""
    assert inverse_frequencies(arch(partial_rotary_factor=0.0)).shape == (0,)


def test_only_yarn_scales_cosines_and_sines() -> None:
    """0.1 ln(factor) + 1 where the configuration says nothing."""
    assert cos_sin_factor(arch(rope_scaling=LLAMA3)) == 1.0
    assert cos_sin_factor(arch(rope_scaling=YARN)) == yarn_attention_factor(4.0) == 1.138629436111989
    assert yarn_attention_factor(0.5) == 1.0
    assert yarn_attention_factor(40.0, 1.0, 1.0) == 1.0
