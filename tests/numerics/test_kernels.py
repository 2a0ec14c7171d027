"""The kernels as Python sees them: quantisation within its bounds, products, the sampler against a plain reference.

That instruction sets, threads and batches give the same bits is proved by the kernels' own test program
(test_kernels_selftest.py); here the results themselves are right.
"""

import itertools

import autoglm_kernels as kernels
import numpy as np
import numpy.typing as npt
import pytest

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
LAYOUTS = ("panels", "rows", "columns")
INTEGERS = list(itertools.product(("int8", "int4"), LAYOUTS, (32, 64, 128)))


def weights_of(n: int, k: int, seed: int = 0) -> F32:
    return np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32) / np.float32(np.sqrt(k))


def packed(kind: str, layout: str, group: int, w: F32, importance: F32 | None = None) -> kernels.PackedMatrix:
    n, k = w.shape
    data_bytes, scale_bytes = kernels.packed_bytes(kind, layout, n, k, group)
    data, scales = np.zeros(data_bytes, np.uint8), np.zeros(scale_bytes // 2, np.uint16)
    padded = np.zeros((kernels.padded_rows(kind, layout, n, k, group), k), np.float32)
    padded[:n] = w
    kernels.pack_rows(kind, layout, n, group, padded, 0, data, scales, importance)
    return kernels.PackedMatrix(kind, layout, n, k, group, data, scales)


def group_tops(w: F32, group: int) -> F32:
    """For every weight the largest magnitude of its group."""
    n, k = w.shape
    padded = np.zeros((n, -(-k // group) * group), np.float32)
    padded[:, :k] = np.abs(w)
    tops = padded.reshape(n, -1, group).max(axis=2)
    return np.repeat(tops, group, axis=1)[:, :k]


@pytest.mark.parametrize(("kind", "layout", "group"), INTEGERS)
def test_a_weight_moves_by_no_more_than_half_a_step(kind: str, layout: str, group: int) -> None:
    """int8 has 254 steps over a group's range; int4 has 15 and may clip the side of the range that is searched away."""
    w = weights_of(37, 200)
    moved = np.abs(packed(kind, layout, group, w).dequantise() - w)
    step = group_tops(w, group) / (127.0 if kind == "int8" else 8.0)
    # int8 scales are rounded up to bf16 (2^-8 at most). int4 may stretch the step by 6/5 and clips at 7 steps of 8.
    assert np.all(moved <= step * (0.51 if kind == "int8" else 1.5))
    root = np.sqrt(np.mean(moved**2) / np.mean(w**2))
    assert root < (0.01 if kind == "int8" else 0.12)


@pytest.mark.parametrize("layout", ["panels", "rows"])
def test_bf16_weights_are_rounded_to_the_nearest(layout: str) -> None:
    """bf16 weights are the nearest bf16 numbers."""
    w = weights_of(20, 50)
    got = packed("bf16", layout, 128, w).dequantise()
    bits = w.view(np.uint32)
    nearest = ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
    np.testing.assert_array_equal(got, nearest)


def test_all_layouts_hold_the_same_weights() -> None:
    """Whichever layout a matrix is packed in, it holds the same weights."""
    w = weights_of(50, 130)
    for kind in ("int8", "int4"):
        first, *others = (packed(kind, layout, 32, w).dequantise() for layout in LAYOUTS)
        for other in others:
            np.testing.assert_array_equal(first, other)


def test_important_inputs_keep_more_of_their_precision() -> None:
    """The error weighed by importance falls, and never rises, when int4 packing is told the importance."""
    w = weights_of(64, 256)
    importance = np.random.default_rng(1).exponential(1.0, 256).astype(np.float32) ** 2
    plain = packed("int4", "panels", 32, w).dequantise()
    told = packed("int4", "panels", 32, w, importance).dequantise()

    def error(got: F32) -> float:
        return float(np.sum(importance * (got - w) ** 2))

    assert error(told) < 0.95 * error(plain)
    assert np.sum((plain - w) ** 2) < np.sum((told - w) ** 2)


@pytest.mark.parametrize("isa", kernels.available())
@pytest.mark.parametrize(("kind", "layout", "group"), [*INTEGERS, ("bf16", "panels", 128)])
def test_products_are_those_of_the_dequantised_weights(isa: str, kind: str, layout: str, group: int) -> None:
    """What is left is the rounding of activations to 8 bits: half a step each, as a random sum."""
    w = weights_of(83, 200)
    matrix = packed(kind, layout, group, w)
    x = np.random.default_rng(2).standard_normal((21, 200)).astype(np.float32)
    x[4] = 0
    got = matrix.multiply(kernels.Device(isa=isa), x)
    exact = x.astype(np.float64) @ matrix.dequantise().astype(np.float64).T
    assert got.shape == (21, 83) and not got[4].any()
    tolerance = 1e-5 if kind == "bf16" else 0.06
    assert np.abs(got - exact).max() < tolerance
    np.testing.assert_array_equal(matrix.multiply(kernels.Device(isa="portable"), x), got)
    np.testing.assert_array_equal(matrix.multiply(kernels.Device(isa=isa), x[7:8]), got[7:8])


def test_an_instruction_set_is_used_when_named_and_refused_when_it_is_not_there() -> None:
    """A named instruction set is used, an unknown or absent one refused by name."""
    names = kernels.available()
    assert "portable" in names
    for name in names:
        assert kernels.Device(isa=name).isa == name
    assert kernels.Device().isa in names
    for absent in {"avx2", "avx512", "amx", "neon"} - set(names):
        with pytest.raises(ValueError, match=absent):
            kernels.Device(isa=absent)
    with pytest.raises(ValueError, match="sse9"):
        kernels.Device(isa="sse9")
    for threads in (0, -1, 1025):
        with pytest.raises(ValueError, match="threads"):
            kernels.Device(threads)


def test_what_does_not_fit_is_refused() -> None:
    """Wrong shapes and names end in a ValueError that says what is wrong."""
    w = weights_of(16, 64)
    matrix = packed("int8", "panels", 32, w)
    with pytest.raises(ValueError, match="columns"):
        matrix.multiply(kernels.Device(), np.zeros((1, 63), np.float32))
    for kind, layout, n, k, group in (
        ("int3", "panels", 16, 64, 32),
        ("int8", "tiles", 16, 64, 32),
        ("int8", "panels", 0, 64, 32),
        ("int8", "panels", 16, 64, 48),
        ("bf16", "columns", 16, 64, 32),
    ):
        with pytest.raises(ValueError):
            kernels.packed_bytes(kind, layout, n, k, group)
    data, scales = np.zeros(16 * 64, np.uint8), np.zeros(16 * 2, np.uint16)
    with pytest.raises(ValueError, match="smaller"):
        kernels.PackedMatrix("int8", "panels", 16, 64, 32, data[:-64].copy(), scales)
    with pytest.raises(ValueError, match="smaller"):
        kernels.pack_rows("int8", "panels", 16, 32, w, 0, data, scales[:-1].copy())
    with pytest.raises(ValueError, match="outside"):
        kernels.pack_rows("int8", "panels", 16, 32, w, 1, data, scales)
    with pytest.raises(ValueError, match="importance"):
        kernels.pack_rows("int4", "panels", 16, 32, w, 0, data, scales, np.ones(63, np.float32))
    for bad in (np.nan, np.inf):
        broken = w.copy()
        broken[3, 5] = bad
        with pytest.raises(ValueError, match="NaN"):
            kernels.pack_rows("int8", "panels", 16, 32, broken, 0, data, scales)


# ---- the sampler


@pytest.fixture
def sampler() -> kernels.Sampler:
    return kernels.Sampler(kernels.Device())


def kept_probabilities(logits: F32, temperature: float, top_k: int, top_p: float, min_p: float) -> F64:
    """What each token's share of the draws should be: top_k, then min_p, then top_p as a share of what top_k leaves."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    weights = np.exp((logits.astype(np.float64) - float(logits.max())) / temperature)
    if 0 < top_k < len(logits):
        order = order[:top_k]
    total = sum(weights[i] for i in order)
    kept: list[int] = []
    sum_ = 0.0
    for i in order:
        if kept and weights[i] < min_p:
            break
        kept.append(i)
        sum_ += float(weights[i])
        if top_p < 1 and sum_ >= top_p * total:
            break
    p = np.zeros(len(logits))
    p[kept] = weights[kept] / weights[kept].sum()
    return p


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 0, 1.0, 0.0),
        (0.5, 0, 1.0, 0.0),
        (2.0, 7, 1.0, 0.0),
        (1.0, 0, 0.8, 0.0),
        (1.3, 12, 0.7, 0.0),
        (1.0, 0, 1.0, 0.1),
        (1.5, 20, 0.95, 0.05),
    ],
)
def test_draws_are_distributed_as_asked(
    sampler: kernels.Sampler, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    """A hundred thousand draws: no token that the filters drop, and chi-squared within five deviations of its mean."""
    logits = np.random.default_rng(3).normal(0, 1.5, 40).astype(np.float32)
    p = kept_probabilities(logits, temperature, top_k, top_p, min_p)
    uniforms = np.random.default_rng(4).random(100_000)
    drawn = [
        sampler.draw(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, uniform=float(u))
        for u in uniforms
    ]
    counts = np.bincount(drawn, minlength=40)
    assert not counts[p == 0].any()
    expected = p[p > 0] * len(uniforms)
    free = len(expected) - 1
    chi_squared = float(np.sum((counts[p > 0] - expected) ** 2 / expected))
    assert chi_squared < free + 5 * np.sqrt(2 * free)


def test_the_best_token_wins_at_temperature_zero_and_ties_go_to_the_lower_id(sampler: kernels.Sampler) -> None:
    """Temperature zero takes the best token, the lowest id on ties."""
    logits = np.array([1, 3, 2, 3, 3], np.float32)
    assert sampler.draw(logits, temperature=0.0) == 1
    assert sampler.draw(logits, top_k=1, uniform=0.99) == 1
    assert sampler.draw(logits, top_k=2, uniform=0.49) == 1
    assert sampler.draw(logits, top_k=2, uniform=0.51) == 3  # of three equals the two lower ones are kept
    assert [token for token, _ in sampler.logprobs(logits, 0, 3)[1]] == [1, 3, 4]


def test_the_random_number_walks_through_the_tokens(sampler: kernels.Sampler) -> None:
    """Unfiltered draws invert the cumulative distribution in order of ids, up to its very end."""
    logits = np.zeros(8, np.float32)
    assert [sampler.draw(logits, uniform=(i + 0.5) / 8) for i in range(8)] == list(range(8))
    assert sampler.draw(logits, uniform=0.0) == 0
    assert sampler.draw(logits, uniform=float(np.nextafter(1.0, 0.0))) == 7


def test_only_allowed_tokens_are_drawn(sampler: kernels.Sampler) -> None:
    """A mask leaves only the allowed tokens."""
    logits = np.random.default_rng(5).normal(0, 2, 70).astype(np.float32)
    allowed = {3, 31, 32, 69}
    mask = np.zeros(3, np.uint32)
    for token in allowed:
        mask[token // 32] |= np.uint32(1 << token % 32)
    filters: list[dict[str, float]] = [{}, {"top_p": 0.9}, {"min_p": 0.01}]
    for more in filters:
        drawn = {sampler.draw(logits, uniform=u / 2000, allowed=mask, **more) for u in range(2000)}  # type: ignore[arg-type]
        assert drawn <= allowed and (more or drawn == allowed)
    assert sampler.draw(logits, temperature=0.0, allowed=mask) == max(allowed, key=lambda i: logits[i])
    assert sampler.draw(logits, allowed=np.zeros(3, np.uint32)) == -2
    with pytest.raises(ValueError, match="mask"):
        sampler.draw(logits, allowed=np.zeros(2, np.uint32))


def test_bias_comes_first_then_repetition_then_presence_and_frequency(sampler: kernels.Sampler) -> None:
    """Every one moves the winner as a plain computation says."""
    rng = np.random.default_rng(6)
    for _ in range(300):
        logits = rng.normal(0, 2, 33).astype(np.float32)
        ids = rng.choice(33, 9, replace=False).astype(np.int32)
        bias = rng.normal(0, 2, 9).astype(np.float32)
        output = rng.integers(0, 4, 9).astype(np.int32)
        moved = logits.astype(np.float64)
        moved[ids] += bias
        moved[ids] = np.where(moved[ids] > 0, moved[ids] / 1.5, moved[ids] * 1.5)
        moved[ids] -= np.where(output > 0, 0.5 + 0.25 * output, 0.0)
        got = sampler.draw(
            logits,
            temperature=0.0,
            bias_ids=ids,
            bias=bias,
            seen_ids=ids,
            seen_output=output,
            repetition=1.5,
            presence=0.5,
            frequency=0.25,
        )
        assert got == int(np.argmax(moved))
    with pytest.raises(ValueError, match="bias_ids"):
        sampler.draw(logits, bias_ids=np.array([33], np.int32), bias=np.ones(1, np.float32))
    with pytest.raises(ValueError, match="seen_ids"):
        sampler.draw(logits, seen_ids=np.array([-1], np.int32), seen_output=np.ones(1, np.int32))
    with pytest.raises(ValueError, match="length"):
        sampler.draw(logits, bias_ids=ids, bias=bias[:-1].copy())


def test_logits_that_are_not_finite_draw_nothing(sampler: kernels.Sampler) -> None:
    """NaN and plus infinity are refused; minus infinity is a probability of zero."""
    for bad in (np.nan, np.inf):
        logits = np.zeros(20, np.float32)
        logits[7] = bad
        assert sampler.draw(logits) == -1
        with pytest.raises(OverflowError, match="finite"):
            sampler.logprobs(logits, 0)
    logits[7] = -np.inf
    assert 7 not in {sampler.draw(logits, uniform=u / 200) for u in range(200)}
    assert sampler.logprobs(logits, 0)[0] == pytest.approx(-np.log(19), abs=1e-6)
    with pytest.raises(ValueError, match="no logits"):
        sampler.draw(np.zeros(0, np.float32))


def test_filters_over_a_large_vocabulary_keep_what_they_should(sampler: kernels.Sampler) -> None:
    """Flat distributions keep thousands of candidates: the search for them must not stop early."""
    logits = np.random.default_rng(7).normal(0, 0.1, 5000).astype(np.float32)
    p = kept_probabilities(logits, 1.0, 0, 0.9, 0.0)
    order = sorted((int(i) for i in np.flatnonzero(p)), key=lambda i: (-logits[i], i))
    sums = np.cumsum(p[order])
    for u in np.random.default_rng(8).random(300):
        place = order.index(sampler.draw(logits, top_p=0.9, uniform=float(u)))
        # One token more or less at the edge of 0.9 shifts the scale by 1/4500.
        assert (sums[place - 1] if place else 0.0) - 1e-3 <= u <= sums[place] + 1e-3


def test_logprobs_are_natural_logarithms_of_the_softmax(sampler: kernels.Sampler) -> None:
    """Log-probabilities are those of the plain softmax."""
    logits = np.random.default_rng(9).normal(0, 3, 1000).astype(np.float32)
    exact = logits - float(logits.max()) - np.log(np.sum(np.exp(logits.astype(np.float64) - float(logits.max()))))
    chosen, top = sampler.logprobs(logits, 17, 5)
    assert chosen == pytest.approx(exact[17], abs=1e-5)
    assert [token for token, _ in top] == list(np.argsort(-logits, kind="stable")[:5])
    assert [value for _, value in top] == pytest.approx([exact[token] for token, _ in top], abs=1e-5)
    for token in (-1, 1000):
        with pytest.raises(ValueError, match="outside"):
            sampler.logprobs(logits, token)
