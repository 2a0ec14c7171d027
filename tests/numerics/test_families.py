"""Every family in odd shapes: the reference executor computes what transformers computes from the same files."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: run `make test` (group numerics)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: run `make test`")

from engine.checkpoints.architecture import Checkpoint
from engine.checkpoints.hf_config import parse
from engine.checkpoints.opening import open_checkpoint
from engine.checkpoints.rope import cos_sin_factor, inverse_frequencies
from engine.executors.interface import Span, Wants
from engine.executors.reference import ReferenceExecutor
from tests.fakes.checkpoints import Written, write_checkpoint

GQA_7 = {"hidden_size": 112, "num_attention_heads": 7, "num_key_value_heads": 1}
FATRELU = {"hidden_act": "fatrelu", "hidden_act_param": 0.1}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "glm": ("glm", {"hidden_act": "relu"}),
    "glm-gqa-7:1-sharded": ("glm", GQA_7 | {"head_dim": 16, "max_shard_size": "60KB"}),
    "glm-bias-odd-rotary": ("glm", {"attention_bias": True, "head_dim": 20}),
    "glm-quarter-rotary-tied": ("glm", {"partial_rotary_factor": 0.25, "tie_word_embeddings": True}),
    "glm-yarn": ("glm", {"rope_scaling": YARN}),
    "glm4": ("glm4", {}),
    "glm4-one-layer-bf16": ("glm4", {"num_hidden_layers": 1, "dtype": "bfloat16", "attention_bias": False}),
    "glm4-tied-sharded": ("glm4", {"tie_word_embeddings": True, "max_shard_size": "60KB"}),
    "llama": ("llama", {}),
    "llama-gqa-7:1-bf16-sharded": ("llama", GQA_7 | {"dtype": "bfloat16", "max_shard_size": "60KB"}),
    "llama-bias-wide-heads": ("llama", {"attention_bias": True, "head_dim": 28}),
    "llama-one-layer-tied-f16": ("llama", {"num_hidden_layers": 1, "tie_word_embeddings": True, "dtype": "float16"}),
    "llama-multi-head": ("llama", {"num_key_value_heads": 6}),
    "llama-relu": ("llama", {"hidden_act": "relu"}),
    "llama-fatrelu": ("llama", FATRELU),
    "llama-relu2": ("llama", {"hidden_act": "relu2"}),
    "llama-gelu": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "llama-linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    "llama-llama3": ("llama", {"rope_scaling": LLAMA3, "rope_theta": 500_000.0}),
    "llama-yarn": ("llama", {"rope_scaling": YARN}),
    "llama-yarn-own-factor": ("llama", {"rope_scaling": YARN | {"attention_factor": 1.7, "beta_fast": 16.0}}),
    "llama-yarn-mscale": ("llama", {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.2}}),
    "qwen2": ("qwen2", {}),
    "qwen2-gqa-7:1-tied-bf16": ("qwen2", GQA_7 | {"tie_word_embeddings": True, "dtype": "bfloat16"}),
    "qwen2-yarn-sharded": ("qwen2", {"rope_scaling": YARN, "max_shard_size": "60KB"}),
    "qwen3": ("qwen3", {}),
    "qwen3-bias-tied-bf16": ("qwen3", {"attention_bias": True, "tie_word_embeddings": True, "dtype": "bfloat16"}),
    "qwen3-gqa-7:1-one-layer": ("qwen3", GQA_7 | {"head_dim": 32, "num_hidden_layers": 1}),
    "minicpm": ("minicpm", {}),
    "minicpm-fatrelu-untied-bf16": (
        "minicpm", FATRELU | {"tie_word_embeddings": False, "dtype": "bfloat16"},
    ),
    "minicpm-gqa-7:1-linear": ("minicpm", GQA_7 | {"rope_scaling": {"type": "linear", "factor": 2.0}}),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    written: Written
    checkpoint: Checkpoint
    executor: ReferenceExecutor


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Models this small lose time to threads: on a busy machine, a hundredfold."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    family, changes = CASES[request.param]
    directory: Path = tmp_path_factory.mktemp(family)
    written = write_checkpoint(directory, family, **changes)
    checkpoint = open_checkpoint(directory)
    yield Case(written, checkpoint, ReferenceExecutor(checkpoint, page_count=12, max_rows=128))
    checkpoint.close()


def test_logits_match_transformers(case: Case) -> None:
    """Float32 logits are those of transformers to 1e-4 of their range, at every position."""
    ids = [random.Random(3).randrange(275) for _ in range(70)]
    expected = case.written.logits(ids)
    (actual,) = case.executor.step([Span(ids, 0, [7, 2, 0, 11, 4], Wants.ALL)])
    assert actual is not None and np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max()


def test_greedy_tokens_are_those_of_transformers(case: Case) -> None:
    """Decoding token by token, 64 greedy choices are equal."""
    prompt = [random.Random(4).randrange(275) for _ in range(11)]
    expected = case.written.greedy(prompt, 64)
    pages = [5, 1, 9, 3, 8]
    chosen: list[int] = []
    pending, start = prompt, 0
    while len(chosen) < 64:
        (logits,) = case.executor.step([Span(pending, start, pages, Wants.LAST)])
        assert logits is not None and logits.shape == (1, 275)
        start += len(pending)
        pending = [int(logits[0].argmax())]
        chosen += pending
    assert chosen == expected
    assert len(set(chosen)) > 3, "a constant continuation would prove nothing"


def test_rows_are_parts_of_the_tensor(case: Case) -> None:
    """What is read in pieces is what is read whole, halves of fused matrices too; and no weight is left out."""
    arch, checkpoint = case.checkpoint.architecture, case.checkpoint
    assert arch.parameters == sum(parameter.numel() for parameter in _parameters(case.written))
    layer = arch.num_hidden_layers - 1
    for name in ("q", "gate", "up", "down"):
        whole = checkpoint.tensor(name, layer)
        pieces = [
            checkpoint.rows(name, start, min(start + 37, len(whole)), layer) for start in range(0, len(whole), 37)
        ]
        assert np.array_equal(np.concatenate(pieces), whole)
        assert whole.dtype == np.float32 and whole.flags.c_contiguous
    assert np.array_equal(checkpoint.rows("embedding", 5, 9), checkpoint.tensor("embedding")[5:9])


@pytest.mark.parametrize(
    ("theta", "head_dim", "scaling"),
    [
        (10_000.0, 128, {"rope_type": "default"}),
        (10_000.0, 80, {"rope_type": "linear", "factor": 3.0}),
        (500_000.0, 64, LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 8192}),
        (1_000_000.0, 128, YARN | {"original_max_position_embeddings": 32_768}),
        (1_000_000.0, 96, YARN | {"factor": 2.5, "beta_fast": 24.0, "beta_slow": 2.0, "mscale": 1.0}),
    ],
    ids=["plain", "linear", "llama3", "yarn", "yarn-betas"],
)
def test_frequencies_of_real_sizes_match_transformers(theta: float, head_dim: int, scaling: dict[str, Any]) -> None:
    """Ours are computed to the last bit; those of transformers differ by a few float32 steps from CPU to CPU."""
    config = transformers.LlamaConfig(
        hidden_size=8 * head_dim, num_attention_heads=8, max_position_embeddings=131_072,
        rope_parameters=scaling | {"rope_theta": theta},
    )  # fmt: skip
    reference = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    arch = parse(config.to_dict(), Path("config.json"))
    assert np.allclose(inverse_frequencies(arch), reference.inv_freq.numpy(), rtol=2.0**-21, atol=0)
    assert cos_sin_factor(arch) == pytest.approx(reference.attention_scaling, rel=1e-12)


def _parameters(written: Written) -> Iterator[Any]:
    """A folded MiniCPM has a head of its own even where the file has none."""
    tied = written.settings["tie_word_embeddings"]
    for name, parameter in written.model.named_parameters():
        if not (tied and name == "lm_head.weight"):
            yield parameter
