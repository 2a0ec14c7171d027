"""The measured figures of glm-tiny's card: each is checked against a slow, plain computation of the same thing."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the measured model is a torch module (dependency group `numerics`)")

from rich.progress import Progress
from safetensors.torch import save_file

from services.trainer.pretrain import baselines, bpe, card, evaluate, export, record, stages
from services.trainer.pretrain.corpus import Corpus, Document
from services.trainer.pretrain.glm import Glm, GlmShape
from services.trainer.pretrain.train import Plan

SHAPE = GlmShape(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    max_position_embeddings=64,
)
TEXT = 'def first(items):\n    """Return the first of several items."""\n    head = items[0]\n    return head\n' * 3
DOCUMENTS = (Document("csv.py", "csv", TEXT + "# é\n"), Document("json/a.py", "json", TEXT.replace("first", "last")))


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Models this small lose time to threads: on a busy machine, a hundredfold."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("length", "window", "stride"), [(3, 8, 4), (8, 8, 4), (9, 8, 4), (12, 8, 4), (100, 8, 3)])
def test_windows_score_each_position_once_with_enough_context(length: int, window: int, stride: int) -> None:
    """No position is scored twice or missed, and past the first window each sees window − stride before it."""
    scored: list[int] = []
    for begin, start, end in evaluate.windows(2, length, window, stride):
        assert end - begin <= window
        assert start - begin >= (window - stride if begin else 2)
        scored.extend(range(start, end))
    assert scored == list(range(2, length))


def _plain_witten_bell(train: Sequence[int], asked: Sequence[int], order: int, kinds: int) -> float:
    """Bits of `asked` by the textbook recursion, one symbol at a time; zeros stand before each sequence."""

    def grams(sequence: Sequence[int], length: int) -> list[tuple[int, ...]]:
        padded = [0] * (length - 1) + list(sequence)
        return [tuple(padded[i : i + length]) for i in range(len(sequence))]

    total = 0.0
    counts = {length: Counter(grams(train, length)) for length in range(1, order + 1)}
    for full in grams(asked, order):
        probability = 1 / kinds
        for length in range(1, order + 1):
            gram = full[order - length :]
            followers = {g: c for g, c in counts[length].items() if g[:-1] == gram[:-1]}
            if followers:
                mass, types = sum(followers.values()), len(followers)
                probability = (counts[length][gram] + types * probability) / (mass + types)
        total -= math.log2(probability)
    return total


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_sorted_keys_count_like_the_textbook(order: int) -> None:
    """The vectorised Witten–Bell model assigns the same bits as the recursion written out."""
    rng = np.random.default_rng(order)
    train, asked = rng.integers(0, 5, 200).astype(np.uint16), rng.integers(0, 6, 40).astype(np.uint16)
    everything = np.ones(len(asked), dtype=np.bool_)
    bits = baselines.witten_bell(train, asked, everything, order, 3)
    assert bits[-1] == pytest.approx(_plain_witten_bell(train.tolist(), asked.tolist(), order, 8))


def test_an_order_that_does_not_fit_a_key_is_refused() -> None:
    """Nine bytes cannot be packed into 64 bits; silently dropping one would be a wrong figure."""
    symbols = np.zeros(4, dtype=np.uint16)
    with pytest.raises(ValueError, match="9 symbols of 8 bits"):
        baselines.witten_bell(symbols, symbols, np.ones(4, dtype=np.bool_), 9, 8)


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    model = Glm(SHAPE)
    tokenizer = bpe.train([TEXT], SHAPE.vocab_size)
    # A text this small has fewer merges than asked for; the model keeps a few unused rows, as padding would.
    export.write(model, tokenizer, tmp_path)
    return tmp_path


def test_the_score_is_the_models_own_log_likelihood(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One window: bits are −log2 p of every text token, prefix and end mark left out; bytes are UTF-8 bytes."""
    model = export.read(exported)
    tokenizer = bpe.train([TEXT], SHAPE.vocab_size)
    ids = tokenizer.encode(TEXT).ids
    with torch.inference_mode():
        logs = torch.log_softmax(model.logits(model(torch.tensor([ids])))[0], -1)
        expected = -sum(float(logs[i - 1, ids[i]]) for i in range(2, len(ids))) / math.log(2)
        bits, tokens = evaluate.score(model, tokenizer, TEXT)
        assert bits == pytest.approx(expected, rel=1e-5)
        assert tokens == len(ids) - 2
        monkeypatch.setattr(evaluate, "WINDOW", 16)
        monkeypatch.setattr(evaluate, "STRIDE", 8)
        short, same = evaluate.score(model, tokenizer, TEXT)
    assert same == tokens
    assert short != pytest.approx(expected, rel=1e-7), "windows of 16 tokens must have cut some context"


def test_gate_zeros_are_counted_where_text_is_scored(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The zero share of each layer is the share of ReLU outputs equal to 0, each scored position counted once."""
    model = export.read(exported)
    tokenizer = bpe.train([TEXT], SHAPE.vocab_size)
    counter = evaluate.GateCounter(model)
    seen: list[float] = []
    hook = model.get_submodule("layers.1.mlp.gate_up_proj").register_forward_hook(
        lambda _m, _i, out: seen.append(float((torch.relu(out.chunk(2, -1)[0])[0, 1:-1] == 0).double().mean()))
    )
    with torch.inference_mode():
        _, tokens = evaluate.score(model, tokenizer, TEXT, counter)
    hook.remove()
    counter.close()
    figures = counter.figures()
    assert figures["positions"] == tokens
    assert figures["zero_share_by_layer"][1] == pytest.approx(seen[0])
    assert 0 < figures["zero_share"] < 1


def test_a_subset_is_the_same_every_time_and_within_its_bound() -> None:
    """Whole documents, chosen by content hash: order of input and file names play no part."""
    documents = [Document(f"{n}.py", "x", f"text {n} " * 50) for n in range(20)]
    some = evaluate.chosen(documents, 2000)
    assert some == evaluate.chosen(documents[::-1], 2000)
    assert 1000 < sum(len(d.text.encode()) for d in some) <= 2000
    assert evaluate.chosen(documents, 10**6) == tuple(documents)


def test_the_card_says_what_the_files_say(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every measured figure of the card stands in evaluation.json; another text's baselines are refused."""
    monkeypatch.setattr(evaluate, "SAMPLE_TOKENS", 4)
    tokenizer = bpe.train([TEXT], SHAPE.vocab_size)
    train = (Document("bisect.py", "bisect", TEXT * 2),)
    ids = np.asarray(tokenizer.encode(train[0].text).ids, dtype=np.uint16)
    shares: list[float] = []
    measured = evaluate.measure(exported, DOCUMENTS, train, tokenizer, lambda share, _: shares.append(share))
    compared = baselines.measure(train, DOCUMENTS, tokenizer, ids, lambda _number, _name: None)
    sizes = {"train_bytes": 1, "held_out_bytes": 2, "train_tokens": len(ids)}
    run = record.begin(Plan(), sizes).finished(tokens=8192, spent_s=60.0)
    manifest = {
        "python": "3.11",
        "held_out_packages": ["csv", "http"],
        "train": {"test/test_httplib.py": "0", "bisect.py": "1"},
        "held_out": {"csv.py": "2"},
        "dropped": {},
    }
    card.write(exported, run, measured, compared, manifest)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    text = (exported / "README.md").read_text()
    stored = json.loads((exported / "evaluation.json").read_text())
    assert stored["measurement"]["weights"] == export.weights_digest(exported)
    assert f"{stored['measurement']['held_out']['bits_per_byte']:.3f}" in text
    for name, result in stored["baselines"]["results"].items():
        assert name in text
        assert f"{result['bits_per_byte']:.3f}" in text
    assert "`test/test_httplib.py`" in text
    assert json.loads((exported / "data-manifest.json").read_text()) == manifest
    with pytest.raises(ValueError, match="different held-out text"):
        card.write(exported, run, measured, {**compared, "held_out_digest": "sha256:0"}, manifest)


def test_a_finished_run_stays_finished(tmp_path: Path) -> None:
    """The run record survives its file, and says when and on what it was made."""
    run = record.begin(Plan(minutes=1.0), {"train_tokens": 5}).finished(tokens=10, spent_s=2.5)
    run.save(tmp_path / "run.json")
    assert record.load(tmp_path / "run.json") == run
    assert record.load(tmp_path / "absent.json") is None
    assert run.machine["torch"] == torch.__version__


@pytest.fixture
def checkpointed(tmp_path: Path) -> Path:
    """A working directory with a training run that was stopped somewhere."""
    tensors = {f"model.{name}": p.detach().contiguous() for name, p in Glm(SHAPE).named_parameters()}
    (tmp_path / "checkpoint").mkdir()
    metadata = {key: str(value) for key, value in asdict(SHAPE).items()} | {"tokens": "8192", "spent_s": "61.5"}
    save_file(tensors, tmp_path / "checkpoint" / "state.safetensors", metadata=metadata)
    return tmp_path


def test_finishing_never_trains_again(checkpointed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--finish` takes the checkpoint as it is, and from then on a run with any plan only reads it back."""

    def must_not_run(*_: object) -> None:
        raise AssertionError("trained further")

    monkeypatch.setattr(stages, "train", must_not_run)
    ids = np.zeros(100, dtype=np.uint16)
    steps = stages.Stages(checkpointed, Corpus(DOCUMENTS, (), {}), Progress(disable=True))
    run, model = steps.train(ids, Plan(minutes=95.0), True)
    assert (run.is_finished, run.tokens, run.spent_s) == (True, 8192, 61.5)
    assert model.shape == SHAPE
    again, _ = steps.train(ids, Plan(minutes=120.0), False)
    assert again == run
    assert record.load(checkpointed / "run.json") == run


def test_a_working_directory_belongs_to_one_corpus(tmp_path: Path) -> None:
    """Another Python's library in the same directory would mix two data sets: it is refused by name."""
    stages.Stages(tmp_path, Corpus(DOCUMENTS, (), {}), Progress(disable=True)).manifest()
    stages.Stages(tmp_path, Corpus(DOCUMENTS, (), {}), Progress(disable=True)).manifest()
    with pytest.raises(stages.OtherCorpusError, match="another standard library"):
        stages.Stages(tmp_path, Corpus(DOCUMENTS[:1], (), {}), Progress(disable=True)).manifest()
