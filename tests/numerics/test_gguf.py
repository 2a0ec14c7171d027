"""Every family through a GGUF file: blocks as the `gguf` package reads them, logits as before the export."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: run `make test` (group numerics)")
gguf = pytest.importorskip("gguf", reason="gguf is not installed: run `make test` (group test)")

from engine.checkpoints.architecture import Checkpoint, CheckpointError, present_tensors
from engine.checkpoints.export_gguf import export_gguf
from engine.checkpoints.gguf_blocks import dequantise, encode
from engine.checkpoints.gguf_header import BLOCKS
from engine.checkpoints.gguf_reader import open_gguf
from engine.checkpoints.opening import open_checkpoint
from engine.executors.interface import Span, Wants
from engine.executors.reference import ReferenceExecutor
from tests.fakes.checkpoints import write_checkpoint

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
GQA_7 = {"hidden_size": 112, "num_attention_heads": 7, "num_key_value_heads": 1}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "glm-quarter-rotary-tied": ("glm", {"partial_rotary_factor": 0.25, "tie_word_embeddings": True}),
    "glm-bias-relu": ("glm", {"attention_bias": True, "hidden_act": "relu"}),
    "glm4": ("glm4", {}),
    "llama": ("llama", {}),
    "llama-bias-wide-heads-gqa-7:1": ("llama", GQA_7 | {"attention_bias": True, "head_dim": 28}),
    "llama-fatrelu-linear": (
        "llama",
        {"hidden_act": "fatrelu", "hidden_act_param": 0.1, "rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    ),
    "llama-llama3": ("llama", {"rope_scaling": LLAMA3, "rope_theta": 500_000.0}),
    "llama-yarn-own-factor": ("llama", {"rope_scaling": YARN | {"attention_factor": 1.7, "beta_fast": 16.0}}),
    "qwen2-tied-yarn": ("qwen2", {"tie_word_embeddings": True, "rope_scaling": YARN}),
    "qwen3-one-layer": ("qwen3", {"num_hidden_layers": 1}),
    "minicpm": ("minicpm", {}),
}
TYPES = {name: (code, size) for code, (name, _, size) in BLOCKS.items()}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", TYPES)
def test_blocks_are_read_as_the_gguf_package_reads_them(kind: str) -> None:
    """Random bytes of every type, scales of every size among them, give the same floats bit for bit."""
    code, size = TYPES[kind]
    data = np.random.default_rng(code).integers(0, 256, (40, 7 * size), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType(code)).astype(np.float32).reshape(-1)
    actual = dequantise(kind, data.reshape(-1))
    sane = np.isfinite(expected)
    assert sane.mean() > 0.8 and np.array_equal(np.isfinite(actual), sane)
    assert np.array_equal(actual[sane].view(np.uint32), expected[sane].view(np.uint32))


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_blocks_are_written_as_the_gguf_package_writes_them(kind: str) -> None:
    """Rounding included: halves, zeros and subnormal scales."""
    rng = np.random.default_rng(5)
    values = (rng.standard_normal((64, 96)) * 10.0 ** rng.integers(-7, 3, (64, 1))).astype(np.float32)
    values[3] = 0
    values[4] = np.arange(96) - 127.0
    values[5, ::2] = 63.5
    expected = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind]).tobytes()
    assert encode(kind, values) == expected


def _logits(checkpoint: Checkpoint, ids: list[int]) -> np.ndarray:
    executor = ReferenceExecutor(checkpoint, page_count=6, max_rows=128)
    (logits,) = executor.step([Span(ids, 0, [4, 0, 2, 5, 1], Wants.ALL)])
    assert logits is not None
    return logits.copy()


def _greedy(checkpoint: Checkpoint, prompt: list[int]) -> list[int]:
    executor = ReferenceExecutor(checkpoint, page_count=6, max_rows=128)
    chosen: list[int] = []
    pending, start = prompt, 0
    while len(chosen) < 64:
        (logits,) = executor.step([Span(pending, start, [4, 0, 2, 5, 1], Wants.LAST)])
        assert logits is not None
        start += len(pending)
        pending = [int(logits[0].argmax())]
        chosen += pending
    return chosen


@pytest.mark.parametrize("name", CASES)
def test_a_model_computes_the_same_after_export(name: str, tmp_path: Path) -> None:
    """F32: logits to 1e-4 of their range and 64 greedy tokens equal to transformers'; the file is what `gguf` reads."""
    family, changes = CASES[name]
    written = write_checkpoint(tmp_path / "hf", family, **changes)
    original = open_checkpoint(tmp_path / "hf")
    export_gguf(original, tmp_path / "hf", tmp_path / "out.gguf", "F32")
    checkpoint = open_checkpoint(tmp_path / "out.gguf")
    ids = [random.Random(3).randrange(275) for _ in range(70)]
    expected = written.logits(ids)
    assert np.abs(_logits(checkpoint, ids) - expected).max() <= 1e-4 * np.abs(expected).max()
    prompt = [random.Random(4).randrange(275) for _ in range(11)]
    assert _greedy(checkpoint, prompt) == written.greedy(prompt, 64)
    arch, before = checkpoint.architecture, original.architecture
    assert arch.end_token_ids == before.end_token_ids and arch.activation == before.activation
    assert arch.parameters == before.parameters
    stored = {each.name: each for each in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    down = stored["blk.0.ffn_down.weight"]
    assert np.array_equal(down.data, checkpoint.tensor("down", 0)) and np.array_equal(
        down.data, original.tensor("down", 0)
    )


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0"])
def test_a_model_keeps_its_weights_to_the_precision_of_the_type(kind: str, tmp_path: Path) -> None:
    """What is read back is what the block format keeps of each weight; a second export changes no byte of them."""
    write_checkpoint(tmp_path / "hf", "glm4", intermediate_size=208)  # rows that are no multiple of a block
    original = open_checkpoint(tmp_path / "hf")
    export_gguf(original, tmp_path / "hf", tmp_path / "a.gguf", kind)
    once = open_gguf(tmp_path / "a.gguf")
    export_gguf(once, tmp_path / "a.gguf", tmp_path / "b.gguf", kind)
    twice = open_gguf(tmp_path / "b.gguf")
    bound = {"F16": 2**-11, "BF16": 2**-8, "Q8_0": 0.004}[kind]
    for name in present_tensors(original.architecture):
        before, after = original.tensor(name, 1), once.tensor(name, 1)
        assert np.abs(after - before).max() <= bound * np.abs(before).max()
        assert np.array_equal(twice.tensor(name, 1), after)
        if after.ndim == 2:
            pieces = [once.rows(name, at, min(at + 37, len(after)), 1) for at in range(0, len(after), 37)]
            assert np.array_equal(np.concatenate(pieces), after)
    assert once.header.metadata["tokenizer.ggml.tokens"] == twice.header.metadata["tokenizer.ggml.tokens"]


def test_every_block_type_is_read_in_rows(tmp_path: Path) -> None:
    """A file that the `gguf` package wrote, feed-forward matrices in every type: rows are the package's own values."""
    rng = np.random.default_rng(9)
    kinds = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "F16", "BF16"]
    writer = gguf.GGUFWriter(tmp_path / "k.gguf", "llama")
    hidden, inner = 256, 256
    writer.add_block_count(len(kinds))
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    expected = {}

    def plain(name: str, *shape: int) -> None:
        writer.add_tensor(name, rng.standard_normal(shape).astype(np.float32))

    plain("token_embd.weight", 40, hidden)
    plain("output_norm.weight", hidden)
    for layer, kind in enumerate(kinds):
        code, size = TYPES[kind]
        elements = BLOCKS[code][1]
        data = rng.integers(0, 256, (inner, hidden // elements, size), dtype=np.uint8)
        _tame(kind, data, rng)
        data = data.reshape(inner, -1)
        expected[layer] = gguf.quants.dequantize(data, gguf.GGMLQuantizationType(code)).astype(np.float32)
        typed = data.view({"F16": np.float16}.get(kind, np.uint8))
        writer.add_tensor(f"blk.{layer}.ffn_up.weight", typed, raw_dtype=gguf.GGMLQuantizationType(code))
        for name, rows in (("attn_q", hidden), ("attn_k", 128), ("attn_v", 128), ("attn_output", hidden)):
            plain(f"blk.{layer}.{name}.weight", rows, hidden)
        for name in ("ffn_gate", "ffn_down"):
            plain(f"blk.{layer}.{name}.weight", inner, hidden)
        for name in ("attn_norm", "ffn_norm"):
            plain(f"blk.{layer}.{name}.weight", hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = open_gguf(tmp_path / "k.gguf")
    for layer, values in expected.items():
        assert np.array_equal(checkpoint.tensor("up", layer), values)
        assert np.array_equal(checkpoint.rows("up", 100, 133, layer), values[100:133])
    with pytest.raises(CheckpointError, match="rows 0 to 256"):
        checkpoint.rows("up", 200, 257, 0)


def _tame(kind: str, blocks: np.ndarray, rng: np.random.Generator) -> None:
    """Replaces the 16-bit floats in random blocks by sane ones."""
    places = {"Q6_K": [208], "F16": [0], "Q8_0": [0], "Q4_0": [0], "Q5_0": [0], "BF16": []}.get(kind, [0, 2])
    for at in places:
        scale = rng.uniform(0.001, 0.1, blocks.shape[:2]).astype("<f2")
        blocks[..., at : at + 2] = scale[..., None].view(np.uint8)
    if kind == "BF16":
        blocks[..., 1] = 0x3C
