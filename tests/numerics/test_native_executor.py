"""The native executor against the reference executor, and against itself: the same bits however a step is put together.

Sizes are odd on purpose: seven query heads to one of keys, heads no multiple of 16, one layer, a quarter rotated.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

kernels = pytest.importorskip("autoglm_kernels", reason="the kernels are not compiled: run `make test`")
torch = pytest.importorskip("torch", reason="torch is not installed: run `make test` (group numerics)")
pytest.importorskip("transformers", reason="transformers is not installed: run `make test`")

from engine.checkpoints.architecture import Checkpoint
from engine.checkpoints.opening import open_checkpoint
from engine.checkpoints.packed import pack_or_open
from engine.executors.interface import Span, Wants
from engine.executors.native import NativeExecutor
from engine.executors.reference import ReferenceExecutor
from engine.precision.plan import plan_for
from tests.fakes.checkpoints import write_checkpoint
from tests.numerics.test_families import CASES

GOLDEN = Path(__file__).with_name("glm_tiny_int8.json")
MODEL = Path(__file__).resolve().parents[2] / "models/glm-tiny"
PAGES = [7, 2, 0, 11, 4, 9]
IDS = [random.Random(3).randrange(275) for _ in range(70)]
EXACT = ("glm", "glm4-one-layer-bf16", "llama-relu", "qwen2-gqa-7:1-tied-bf16", "qwen3", "minicpm-fatrelu-untied-bf16")
"""Cases whose bits are compared: every family, tied and untied, with and without zeros to skip."""
Bits = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Packed:
    """A checkpoint and, by plan, its packed weights."""

    checkpoint: Checkpoint
    directory: Path

    def executor(
        self, precision: str, *, threads: int = 1, isa: str = "", skips: bool = False, max_rows: int = 128, **more: Any
    ) -> NativeExecutor:
        arch = self.checkpoint.architecture
        plan = plan_for(precision, arch, skips)
        weights = pack_or_open(self.checkpoint, plan, self.directory, threads, lambda done, total: None)
        return NativeExecutor(arch, plan, weights, kernels.Device(threads, False, isa), 40, max_rows, **more)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Packed]]:
    """Cases as they are asked for."""
    torch.set_num_threads(1)
    made = _Cases(tmp_path_factory.mktemp("native"))
    yield made
    for case in made.values():
        case.checkpoint.close()


class _Cases(dict[str, Packed]):
    def __init__(self, root: Path) -> None:
        super().__init__()
        self._root = root

    def __missing__(self, name: str) -> Packed:
        family, changes = CASES[name]
        directory = self._root / str(len(self))
        write_checkpoint(directory, family, **changes)
        self[name] = Packed(open_checkpoint(directory), self._root / "packed")
        return self[name]


def whole(executor: Any, ids: Sequence[int] = IDS, pages: Sequence[int] = PAGES) -> Bits:
    """Logits after every token, computed in one step."""
    (logits,) = executor.step([Span(ids, 0, pages, Wants.ALL)])
    assert logits is not None
    return np.array(logits)


def in_chunks(executor: Any, size: int, pages: Sequence[int] = PAGES) -> Bits:
    rows = []
    for start in range(0, len(IDS), size):
        (logits,) = executor.step([Span(IDS[start : start + size], start, pages, Wants.ALL)])
        rows.append(np.array(logits))
    return np.concatenate(rows)


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_reference(packed: dict[str, Packed], name: str) -> None:
    """Within 3 % of the largest logit in bf16 and 8 % in int8; on average within a fourth of that."""
    case = packed[name]
    expected = whole(ReferenceExecutor(case.checkpoint, page_count=12, max_rows=128))
    scale = np.abs(expected).max()
    for precision, worst, usual in (("bf16", 0.03, 0.006), ("int8", 0.08, 0.02)):
        error = np.abs(whole(case.executor(precision)) - expected) / scale
        assert error.max() <= worst and np.sqrt((error**2).mean()) <= usual, (precision, error.max())


@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("name", EXACT)
def test_bits_do_not_depend_on_threads_chunks_pages_batch_or_instructions(
    packed: dict[str, Packed], name: str, precision: str
) -> None:
    """One model and one text: one sequence of logits, to the last bit."""
    case = packed[name]
    expected = whole(case.executor(precision))
    for threads in (2, 4):
        assert np.array_equal(whole(case.executor(precision, threads=threads)), expected), f"{threads} threads"
    assert np.array_equal(whole(case.executor(precision, isa="portable")), expected), "portable"
    executor = case.executor(precision)
    for size in (1, 7, 64, 512):
        assert np.array_equal(in_chunks(executor, size), expected), f"chunks of {size}"
    assert np.array_equal(whole(executor, pages=[39, 1, 38, 3, 5]), expected), "other pages"
    few = expected[:10]
    for batch in (3, 8, 17):
        others = [[random.Random(n).randrange(275) for _ in range(1 + n % 5)] for n in range(batch - 1)]
        spans = [Span(ids, 0, [number + 1], Wants.LAST) for number, ids in enumerate(others)]
        spans.insert(batch // 2, Span(IDS[:10], 0, [30], Wants.ALL))
        assert np.array_equal(executor.step(spans)[batch // 2], few), f"batch of {batch}"


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("name", ["glm", "llama-relu", "llama-fatrelu", "llama-relu2"])
def test_leaving_out_inactive_neurons_changes_no_bit(packed: dict[str, Packed], name: str, precision: str) -> None:
    """Zeros add nothing: the dense way over a plan for skipping gives the bits of the skipping way."""
    results = []
    for dense_above in (0.0, 1.0):
        executor = packed[name].executor(precision, skips=True)
        executor.model.dense_above = dense_above
        results += [in_chunks(executor, 1), in_chunks(executor, 7)]
    assert executor.plan.skips_neurons
    assert all(np.array_equal(each, results[0]) for each in results[1:])


def test_a_single_token_skips_however_many_neurons_are_active(packed: dict[str, Packed]) -> None:
    """Unpacking weights for one token costs more than any number of active neurons; only several tokens share it."""
    executor = packed["llama-relu"].executor("int4", skips=True)
    executor.model.dense_above = 0.0
    whole(executor)
    in_chunks(executor, 7)
    assert executor.model.phase_seconds["up"] == 0.0, "the way by listed neurons was taken"
    in_chunks(executor, 1)
    assert executor.model.phase_seconds["up"] > 0.0, "a single token went the dense way"


@pytest.mark.parametrize("kv", ["bf16", "int8"])
def test_a_page_goes_out_and_into_another_executor(packed: dict[str, Packed], kv: Any) -> None:
    """What another worker computed is as good as one's own, wherever it is put; another size is refused."""
    giver, taker = (packed["qwen3"].executor("int8", kv=kv) for _ in range(2))
    expected = whole(giver)[64:]
    for ours, theirs in zip((20, 5, 6, 33), PAGES, strict=False):
        payload = giver.read_page(theirs)
        assert len(payload) == taker.page_bytes
        taker.write_page(ours, payload)
        assert taker.read_page(ours) == payload
    (logits,) = taker.step([Span(IDS[64:], 64, [20, 5, 6, 33, 8], Wants.ALL)])
    assert np.array_equal(logits, expected)
    with pytest.raises(ValueError, match="bytes"):
        taker.write_page(0, b"short")


@pytest.mark.skipif(not (MODEL / "model.safetensors").exists(), reason="the model is not here")
def test_greedy_tokens_of_glm_tiny_are_the_committed_ones(tmp_path: Path) -> None:
    """The file was written on another CPU: same model, same prompt, same tokens everywhere."""
    golden = json.loads(GOLDEN.read_text())
    checkpoint = open_checkpoint(MODEL)
    try:
        assert checkpoint.weight_files_digest == golden["weights"], "another model: run this module to write it anew"
        for isa in ("", "portable"):
            executor = Packed(checkpoint, tmp_path).executor("int8", skips=True, isa=isa)
            for text in golden["texts"]:
                assert greedy(executor, text["prompt"], len(text["tokens"])) == text["tokens"], isa
    finally:
        checkpoint.close()


def greedy(executor: Any, prompt: Sequence[int], count: int) -> list[int]:
    """The next `count` tokens, each the likeliest."""
    chosen: list[int] = []
    pending, start = list(prompt), 0
    while len(chosen) < count:
        (logits,) = executor.step([Span(pending, start, list(range(10)), Wants.LAST)])
        start += len(pending)
        pending = [int(logits[0].argmax())]
        chosen += pending
    return chosen


if __name__ == "__main__":  # writes the golden file
    import tempfile

    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    opened = open_checkpoint(MODEL)
    with tempfile.TemporaryDirectory() as scratch:
        native = Packed(opened, Path(scratch)).executor("int8", skips=True)
        prompts = ("import os\n", "class Stack:\n    def push(self, item):\n", 'def read_lines(path):\n    """')
        texts = []
        for each in prompts:
            numbers = tokenizer.encode(each, add_special_tokens=False).ids
            texts.append({"prompt": numbers, "tokens": greedy(native, numbers, 32)})
    GOLDEN.write_text(json.dumps({"weights": opened.weight_files_digest, "texts": texts}) + "\n")
