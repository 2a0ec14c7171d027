"""Rotary frequencies of an architecture: the same bits on every CPU.

Executors take these values instead of computing their own, so that two machines rotate alike. Powers and logarithms
are therefore taken with `decimal`, which has no processor-dependent last bit; the rest is plain IEEE arithmetic in
float32, in the order in which transformers rounds, because these are the frequencies that models were trained with.
"""

from __future__ import annotations

import math
from decimal import Context, Decimal, localcontext

import numpy as np
import numpy.typing as npt

from engine.checkpoints.architecture import Architecture

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

_DIGITS = 40
_PI = Decimal("3.141592653589793238462643383279502884197")


def inverse_frequencies(arch: Architecture) -> F64:
    """Radians per position of each rotated pair, [rotary_size / 2]; every value is a float32. Raises ValueError."""
    powers = _powers(arch.rope_theta, arch.rotary_size)
    scaling = arch.rope_scaling
    plain = np.float32(1) / powers
    if scaling.kind == "linear":
        plain = plain / np.float32(scaling.factor)
    elif scaling.kind == "llama3":
        plain = _llama3(plain, arch)
    elif scaling.kind == "yarn":
        plain = _yarn(powers, arch)
    elif scaling.kind == "factors":
        factors: F32 = np.array(scaling.factors, dtype=np.float32)
        plain = plain / factors
    return plain.astype(np.float64)


def cos_sin_factor(arch: Architecture) -> float:
    """What cosines and sines are multiplied with."""
    return arch.rope_scaling.attention_factor if arch.rope_scaling.kind == "yarn" else 1.0


def yarn_attention_factor(factor: float, mscale: float = 0.0, mscale_all_dim: float = 0.0) -> float:
    """The factor on cosines and sines when a configuration gives none (arXiv 2309.00071, eq. 22)."""

    def temperature(weight: float) -> Decimal:
        return Decimal(1) if factor <= 1 else Decimal("0.1") * Decimal(weight) * Decimal(factor).ln() + 1

    with localcontext(Context(prec=_DIGITS)):
        if mscale and mscale_all_dim:
            return float(temperature(mscale) / temperature(mscale_all_dim))
        return float(temperature(1.0))


def _powers(theta: float, size: int) -> F32:
    """theta ** (2 i / size), the exponent rounded to float32 as in transformers."""
    exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(max(size, 1))
    with localcontext(Context(prec=_DIGITS)):
        logarithm = Decimal(theta).ln()
        powers = [float((logarithm * Decimal(float(exponent))).exp()) for exponent in exponents]
    return np.array(powers, dtype=np.float32)


def _llama3(plain: F32, arch: Architecture) -> F32:
    """Long waves are stretched by `factor`, short ones stay, those between are mixed."""
    scaling, context = arch.rope_scaling, np.float32(arch.rope_scaling.original_context)
    low, high = np.float32(scaling.low_freq_factor), np.float32(scaling.high_freq_factor)
    factor = np.float32(scaling.factor)
    wavelength = np.float32(2 * math.pi) / plain
    stretched = np.where(wavelength > context / low, plain / factor, plain)
    mix = (context / wavelength - low) / (high - low)
    mixed = (np.float32(1) - mix) * stretched / factor + mix * stretched
    between = (wavelength >= context / high) & (wavelength <= context / low)
    result: F32 = np.where(between, mixed, stretched)
    return result


def _yarn(powers: F32, arch: Architecture) -> F32:
    """Pairs that turn often keep their frequency, pairs that turn seldom are interpolated, a ramp between."""
    scaling, size = arch.rope_scaling, arch.rotary_size
    if arch.rope_theta <= 1:
        raise ValueError(f"yarn needs a rope_theta above 1, this is {arch.rope_theta}")

    def pair_turning(times: float) -> Decimal:
        """Index of the pair that turns so many times within the original context."""
        turns = Decimal(scaling.original_context) / (Decimal(times) * 2 * _PI)
        return Decimal(size) * turns.ln() / (2 * Decimal(arch.rope_theta).ln())

    with localcontext(Context(prec=_DIGITS)):
        low = max(math.floor(pair_turning(scaling.beta_fast)), 0)
        high: float = min(math.ceil(pair_turning(scaling.beta_slow)), size - 1)
    if low == high:
        high += 0.001
    ramp = (np.arange(size // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    kept = np.float32(1) - np.clip(ramp, np.float32(0), np.float32(1))
    interpolated = np.float32(1) / (np.float32(scaling.factor) * powers)
    mixed: F32 = interpolated * (np.float32(1) - kept) + np.float32(1) / powers * kept
    return mixed
