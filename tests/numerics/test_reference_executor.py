"""The reference executor against transformers, and against itself: same tokens whatever the batch or the chunking."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from engine.checkpoints import glm
from engine.executors.interface import Span
from engine.executors.reference import TILE_ROWS, ReferenceCache, ReferenceExecutor

torch = pytest.importorskip("torch", reason="torch is not installed: run `make test` (group numerics)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: run `make test`")

SHAPES = [
    pytest.param({}, id="as-glm-tiny"),
    pytest.param({"num_attention_heads": 7, "num_key_value_heads": 1, "hidden_size": 112}, id="gqa-7:1"),
    pytest.param({"num_hidden_layers": 1, "tie_word_embeddings": False}, id="one-layer-untied"),
    pytest.param({"attention_bias": True, "hidden_act": "silu", "head_dim": 20}, id="bias-silu-odd-rotary"),
]


def checkpoint(directory: Path, changes: dict[str, object]) -> tuple[glm.GlmWeights, object]:
    """A random GLM written by transformers, and the transformers model itself in float32."""
    settings: dict[str, object] = {
        "vocab_size": 211, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "hidden_act": "relu",
        "attention_bias": False, "tie_word_embeddings": True, "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5, "pad_token_id": 0, "eos_token_id": [0], "initializer_range": 0.3,
    } | changes  # fmt: skip
    torch.manual_seed(7)
    model = transformers.GlmForCausalLM(transformers.GlmConfig(**settings)).float().eval()
    model.save_pretrained(directory)
    return glm.load(directory), model


def run(executor: ReferenceExecutor, ids: list[int], chunks: list[int]) -> np.ndarray:
    """Logits after every token, computed in steps of the given chunk lengths (cut again at block borders)."""
    cache, results, start = executor.new_cache(len(ids)), [], 0
    pending = list(chunks)
    while start < len(ids):
        room = TILE_ROWS - start % TILE_ROWS
        count = min(pending.pop(0) if pending else len(ids), room, len(ids) - start)
        (logits,) = executor.step([Span(cache, ids[start : start + count], True)])
        assert logits is not None
        results.append(logits)
        start += count
    return np.concatenate(results)


@pytest.mark.parametrize("changes", SHAPES)
def test_logits_match_transformers(tmp_path: Path, changes: dict[str, object]) -> None:
    """Float32 logits are those of GlmForCausalLM to 1e-4 of their range, and greedy choices are equal."""
    weights, model = checkpoint(tmp_path, changes)
    ids = [random.Random(3).randrange(211) for _ in range(50)]
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    actual = run(ReferenceExecutor(weights), ids, [16] * 4)
    assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max()
    assert (actual.argmax(-1) == expected.argmax(-1)).all()


@pytest.mark.parametrize("chunks", [[1] * 50, [7] * 8, [16] * 4, [3, 1, 12, 5, 16]], ids=str)
def test_chunking_changes_no_bit(tmp_path: Path, chunks: list[int]) -> None:
    """Prefill in any pieces, down to single decode steps, gives bit-identical logits."""
    weights, _ = checkpoint(tmp_path, {})
    executor = ReferenceExecutor(weights)
    ids = [random.Random(5).randrange(211) for _ in range(50)]
    assert np.array_equal(run(executor, ids, chunks), run(executor, ids, [16] * 4))


@pytest.mark.parametrize("mates", [1, 3, 8, 17])
def test_batch_mates_change_no_bit(tmp_path: Path, mates: int) -> None:
    """A sequence that shares every step with others, at other positions, gets bit-identical logits."""
    weights, _ = checkpoint(tmp_path, {})
    executor = ReferenceExecutor(weights)
    chooser = random.Random(mates)
    ids = [chooser.randrange(211) for _ in range(40)]
    alone = run(executor, ids, [1] * 40)
    others = [executor.new_cache(128) for _ in range(mates)]
    for cache in others:  # at different positions
        for _ in range(chooser.randrange(5)):
            executor.step([Span(cache, [chooser.randrange(211)], False)])
    cache = executor.new_cache(64)
    for index, token in enumerate(ids):
        spans = [Span(other, [chooser.randrange(211)], True) for other in others]
        place = chooser.randrange(len(spans) + 1)
        spans.insert(place, Span(cache, [token], True))
        logits = executor.step(spans)[place]
        assert logits is not None and np.array_equal(logits[0], alone[index])


def test_blocks_of_one_step_equal_blocks_of_many(tmp_path: Path) -> None:
    """Several blocks of one prompt in a single step give the bits of one block per step."""
    weights, _ = checkpoint(tmp_path, {})
    executor = ReferenceExecutor(weights)
    ids = [random.Random(9).randrange(211) for _ in range(60)]
    cache = executor.new_cache(60)
    spans = [Span(cache, ids[start : start + 16], True) for start in range(0, 60, 16)]
    together = np.concatenate([logits for logits in executor.step(spans) if logits is not None])
    assert np.array_equal(together, run(executor, ids, [16] * 4))


def test_a_loaded_block_is_as_good_as_a_computed_one(tmp_path: Path) -> None:
    """Exported and imported keys and values continue with bit-identical logits; a wrong size is refused."""
    weights, _ = checkpoint(tmp_path, {})
    executor = ReferenceExecutor(weights)
    ids = [random.Random(11).randrange(211) for _ in range(45)]
    cold = executor.new_cache(45)
    spans = [Span(cold, ids[start : start + 16], True) for start in (0, 16, 32)]
    expected = executor.step(spans)[2]
    warm = executor.new_cache(45)
    for index in range(2):
        warm.import_block(cold.export_block(index))
    (actual,) = executor.step([Span(warm, ids[32:], True)])
    assert expected is not None and actual is not None and np.array_equal(actual, expected)
    with pytest.raises(ValueError, match="bytes"):
        ReferenceCache(weights.config, 32).import_block(b"\0" * 10)
    with pytest.raises(ValueError, match="not complete"):
        cold.export_block(2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"num_key_value_heads": 4}, "no multiple"),
        ({"vocab_size": 2**40}, "vocab_size"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"intermediate_size": 161}, "shape"),
        ({"eos_token_id": [99999]}, "eos_token_id"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_configuration_is_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    """A configuration that does not fit is refused with the field's name, before any large allocation."""
    import json

    checkpoint(tmp_path, {})
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(glm.CheckpointError, match=message):
        glm.load(tmp_path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    """Half a weights file is a CheckpointError, not a crash."""
    checkpoint(tmp_path, {})
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(glm.CheckpointError, match="safetensors"):
        glm.load(tmp_path)
