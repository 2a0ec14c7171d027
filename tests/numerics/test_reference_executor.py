"""The reference executor against itself: same bits whatever the batch, the chunking or the pages."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed: run `make test` (group numerics)")
pytest.importorskip("transformers", reason="transformers is not installed: run `make test`")

from engine.checkpoints.architecture import CheckpointError
from engine.checkpoints.opening import open_checkpoint
from engine.executors.interface import F32, Executor, Span, Wants
from engine.executors.reference import TILE_ROWS, ReferenceExecutor, page_bytes
from tests.fakes.checkpoints import write_checkpoint

VOCABULARY = 275
PAGES = 96
MODELS = {
    "glm": ("glm", {"hidden_act": "relu"}),
    "glm4": ("glm4", {}),
    "qwen3-7:1": ("qwen3", {"hidden_size": 112, "num_attention_heads": 7, "num_key_value_heads": 1}),
}


@pytest.fixture(scope="module", params=MODELS)
def executor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ReferenceExecutor:
    family, changes = MODELS[request.param]
    return make(tmp_path_factory.mktemp(family), family, **changes)


@pytest.fixture
def small(tmp_path: Path) -> ReferenceExecutor:
    return make(tmp_path, "llama", num_hidden_layers=1)


def make(directory: Path, family: str, **changes: object) -> ReferenceExecutor:
    write_checkpoint(directory, family, **changes)
    return ReferenceExecutor(open_checkpoint(directory), PAGES, max_rows=256)


def tokens(seed: int, count: int) -> list[int]:
    chooser = random.Random(seed)
    return [chooser.randrange(VOCABULARY) for _ in range(count)]


def run(executor: Executor, ids: Sequence[int], chunks: Sequence[int], pages: Sequence[int] = range(PAGES)) -> F32:
    """Logits after every token, computed in steps of the given lengths, the last one for all that is left."""
    results, start, pending = [], 0, list(chunks)
    while start < len(ids):
        count = pending.pop(0) if pending else len(ids)
        (logits,) = executor.step([Span(ids[start : start + count], start, pages, Wants.ALL)])
        assert logits is not None
        results.append(logits)
        start += len(logits)
    return np.concatenate(results)


@pytest.mark.parametrize(
    "chunks", [[1] * 70, [7] * 10, [16] * 5, [3, 1, 12, 5, 40], [64]], ids=["1", "7", "16", "odd", "64"]
)
def test_chunking_changes_no_bit(executor: ReferenceExecutor, chunks: list[int]) -> None:
    """Prefill in any pieces, down to single decode steps, gives bit-identical logits."""
    ids = tokens(5, 70)
    assert np.array_equal(run(executor, ids, chunks), run(executor, ids, [70]))


@pytest.mark.parametrize("mates", [1, 3, 8, 17])
def test_batch_mates_change_no_bit(executor: ReferenceExecutor, mates: int) -> None:
    """A sequence that shares every step with others, at other positions, gets bit-identical logits."""
    chooser = random.Random(mates)
    ids = tokens(mates, 40)
    alone = run(executor, ids, [40], pages=range(90, 96))
    others = [[chooser.randrange(VOCABULARY) for _ in range(chooser.randrange(5))] for _ in range(mates)]
    pages = [range(4 * index, 4 * index + 4) for index in range(mates)]
    for other, mine in zip(others, pages, strict=True):  # at different positions
        if other:
            executor.step([Span(other, 0, mine, Wants.NONE)])
    for index, token in enumerate(ids):
        spans = []
        for other, mine in zip(others, pages, strict=True):
            spans.append(Span([chooser.randrange(VOCABULARY)], len(other), mine, Wants.LAST))
            other.append(0)
        place = chooser.randrange(len(spans) + 1)
        spans.insert(place, Span([token], index, range(80, 84), Wants.LAST))
        logits = executor.step(spans)[place]
        assert logits is not None and np.array_equal(logits[0], alone[index])


def test_page_numbers_and_what_pages_held_before_change_no_bit(executor: ReferenceExecutor) -> None:
    """Pages in any order, and full of NaN when they are handed out, give bit-identical logits."""
    ids = tokens(9, 70)
    expected = run(executor, ids, [70], pages=range(5))
    pages = [44, 3, 91, 17, 60]
    for page in pages:
        executor.write_page(page, np.full(executor.page_bytes // 4, np.nan, dtype="<f4").tobytes())
    assert np.array_equal(run(executor, ids, [9, 1, 30], pages=pages), expected)


def test_a_loaded_page_is_as_good_as_a_computed_one(executor: ReferenceExecutor) -> None:
    """Pages that were read and written elsewhere continue with bit-identical logits."""
    ids = tokens(11, 45)
    expected = run(executor, ids, [45], pages=[0, 1, 2])
    for source, target in ((0, 30), (1, 31)):
        executor.write_page(target, executor.read_page(source))
    (actual,) = executor.step([Span(ids[32:], 32, [30, 31, 50], Wants.ALL)])
    assert np.array_equal(actual, expected[32:])
    assert executor.read_page(31) == executor.read_page(1)


def test_sequences_share_the_pages_of_a_common_prefix(executor: ReferenceExecutor) -> None:
    """Two continuations of one prompt in one step read the same pages, and leave them as they are."""
    prompt, one, two = tokens(13, 32), tokens(14, 9), tokens(15, 20)
    executor.step([Span(prompt, 0, [0, 1], Wants.NONE)])
    shared = [executor.read_page(page) for page in (0, 1)]
    results = executor.step([Span(one, 32, [0, 1, 7], Wants.ALL), Span(two, 32, [0, 1, 8, 9], Wants.ALL)])
    assert [executor.read_page(page) for page in (0, 1)] == shared
    for continuation, logits in zip((one, two), results, strict=True):
        assert np.array_equal(logits, run(executor, prompt + continuation, [100], pages=range(20, 30))[32:])


def test_only_wanted_rows_are_given(small: ReferenceExecutor) -> None:
    """None, the last or all rows of a span, and they are the same rows."""
    ids = tokens(17, 20)
    spans = [Span(ids, 0, [3 * index, 3 * index + 1], wants) for index, wants in enumerate(Wants)]
    results = dict(zip(Wants, small.step(spans), strict=True))
    every, last = results[Wants.ALL], results[Wants.LAST]
    assert results[Wants.NONE] is None and every is not None and last is not None
    assert every.shape == (20, VOCABULARY) and np.array_equal(last, every[-1:])
    assert small.step([]) == []


@pytest.mark.parametrize(
    ("span", "message"),
    [
        (Span([], 0, [0], Wants.ALL), "0 tokens"),
        (Span([1], -1, [0], Wants.ALL), "position -1"),
        (Span([1] * 17, 0, [0], Wants.ALL), "17 tokens at position 0 with 1 pages"),
        (Span([1], 0, [PAGES], Wants.ALL), f"not {PAGES}"),
        (Span([1], 0, [-1], Wants.ALL), "not -1"),
        (Span([VOCABULARY], 0, [0], Wants.ALL), "token ids"),
        (Span([-1], 0, [0], Wants.ALL), "token ids"),
        (Span([1], 100_000, [0] * 6251, Wants.ALL), "beyond"),
        (Span([1] * 257, 0, range(20), Wants.ALL), "at most 256"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_span_is_refused(small: ReferenceExecutor, span: Span, message: str) -> None:
    """The runtime's mistakes end in a ValueError, not in another sequence's memory."""
    with pytest.raises(ValueError, match=message):
        small.step([span])


def test_sizes_are_told_and_bounded(tmp_path: Path, small: ReferenceExecutor) -> None:
    """Pages have the size that is said beforehand; weights that are too large and wrong pages are refused."""
    assert small.block_tokens == TILE_ROWS and (small.page_count, small.max_rows) == (PAGES, 256)
    assert small.page_bytes == page_bytes(small.architecture) == len(small.read_page(PAGES - 1))
    with pytest.raises(ValueError, match="this one 10"):
        small.write_page(0, b"\0" * 10)
    with pytest.raises(ValueError, match="pages are"):
        small.read_page(PAGES)
    with pytest.raises(CheckpointError, match="at most 5000 may"):
        ReferenceExecutor(open_checkpoint(tmp_path), 4, max_bytes=5000)
