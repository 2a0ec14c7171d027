"""Configurations of the Hugging Face layout: what each family means by what it says and by what it leaves out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoints.architecture import Architecture, CheckpointError, RopeScaling
from engine.checkpoints.hf_config import parse, read_architecture

SIZES: dict[str, Any] = {
    "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 8, "max_position_embeddings": 4096,
}  # fmt: skip


def read(kind: str, **changes: object) -> Architecture:
    return parse(SIZES | {"model_type": kind} | changes, Path("config.json"))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("glm", dict(family="glm", head_dim=128, num_key_value_heads=2, rotary_size=64, rotary_interleaved=True,
                     qkv_bias=True, o_bias=False, rms_norm_eps=1.5625e-7, sandwich_norm=False)),
        ("glm4", dict(family="glm4", head_dim=128, rotary_interleaved=True, qkv_bias=True, sandwich_norm=True)),
        ("llama", dict(family="llama", head_dim=32, num_key_value_heads=8, rotary_size=32, rotary_interleaved=False,
                       qkv_bias=False, o_bias=False, rms_norm_eps=1e-6, tie_word_embeddings=False)),
        ("minicpm", dict(family="minicpm", head_dim=32, num_key_value_heads=8, tie_word_embeddings=True)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_is_left_out_is_the_familys_default(kind: str, expected: dict[str, object]) -> None:
    """As in the configuration classes of transformers."""
    arch = dataclasses.asdict(read(kind))
    assert {name: arch[name] for name in expected} == expected


def test_qwen_has_biases_and_norms_of_its_own() -> None:
    """Qwen2 always has biases on query, key and value; Qwen3 has norms per head, and a bias on the output if any."""
    two = read("qwen2", num_key_value_heads=2, attention_bias=False)
    assert (two.qkv_bias, two.o_bias, two.qk_norm, two.head_dim) == (True, False, False, 32)
    three = read("qwen3", num_key_value_heads=2, attention_bias=True)
    assert (three.qkv_bias, three.o_bias, three.qk_norm, three.head_dim) == (True, True, True, 128)


def test_minicpm_scales_embeddings_layers_and_logits() -> None:
    """scale_emb, scale_depth / sqrt(layers), dim_model_base / hidden_size; nobody else has them."""
    scales = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 64}
    arch = read("minicpm", **scales)
    assert (arch.embedding_scale, arch.residual_scale, arch.logit_scale) == (12.0, 0.7, 0.25)
    llama = read("llama", **scales)
    assert (llama.embedding_scale, llama.residual_scale, llama.logit_scale) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("given", "activation", "threshold"),
    [
        ({"hidden_act": "silu"}, "silu", 0.0),
        ({"hidden_act": "relu"}, "relu", 0.0),
        ({"hidden_act": "fatrelu", "hidden_act_param": 0.01}, "relu", 0.01),
        ({"hidden_act": "fatrelu"}, "relu", 0.0),
        ({"hidden_act": "relu2"}, "relu2", 0.0),
        ({"hidden_act": "relu_squared"}, "relu2", 0.0),
        ({"hidden_act": "gelu_pytorch_tanh"}, "gelu_tanh", 0.0),
        ({}, "silu", 0.0),
    ],
    ids=str,
)
def test_activations(given: dict[str, object], activation: str, threshold: float) -> None:
    """The names in use, and FATReLU's threshold."""
    arch = read("llama", **given)
    assert (arch.activation, arch.activation_threshold) == (activation, threshold)


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 1024}


@pytest.mark.parametrize(
    ("kind", "entries", "expected"),
    [
        ("linear", {"factor": 2.0}, RopeScaling("linear", 2.0)),
        ("llama3", LLAMA3, RopeScaling("llama3", 8.0, 1.0, 4.0, 1024)),
        ("yarn", {"factor": 4.0, "attention_factor": 1.5},
         RopeScaling("yarn", 4.0, original_context=4096, attention_factor=1.5)),
        ("yarn", {"factor": 4.0, "original_max_position_embeddings": 512, "finetuned": True},
         RopeScaling("yarn", 4.0, original_context=512, attention_factor=1.138629436111989)),
        ("default", {}, RopeScaling()),
    ],
    ids=["linear", "llama3", "yarn", "yarn-context", "default"],
)  # fmt: skip
def test_old_and_new_spellings_of_rope_say_the_same(
    kind: str, entries: dict[str, object], expected: RopeScaling
) -> None:
    """`rope_scaling` with `type` or `rope_type` beside rope_theta, and transformers 5's `rope_parameters`."""
    new = read("llama", rope_parameters=entries | {"rope_type": kind, "rope_theta": 500_000.0})
    for name in ("type", "rope_type"):
        old = read("llama", rope_scaling=entries | {name: kind}, rope_theta=500_000.0)
        assert old == new
    assert read("llama", rope_theta=500_000.0, rope_parameters=entries | {"rope_type": kind}, rope_scaling=None) == new
    assert new.rope_scaling == expected and new.rope_theta == 500_000.0


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("mixtral", {}, "model_type is 'mixtral'"),
        ("x" * 1000, {}, "model_type is 'xxx"),
        ("llama", {"model_type": ["llama"]}, "model_type"),
        ("llama", {"hidden_size": -1}, "hidden_size is -1; a whole number from 1"),
        ("llama", {"hidden_size": 250}, "no multiple of 8 heads"),
        ("llama", {"num_key_value_heads": 3}, "no multiple of 3"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads"),
        ("llama", {"vocab_size": 2**40}, "vocab_size"),
        ("llama", {"vocab_size": 1000.0}, "vocab_size"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported are silu"),
        ("llama", {"hidden_act": ["silu"]}, "hidden_act"),
        ("llama", {"eos_token_id": [99999]}, "eos_token_id"),
        ("llama", {"eos_token_id": [True]}, "eos_token_id"),
        ("llama", {"eos_token_id": [1] * 100}, "eos_token_id"),
        ("llama", {"rope_theta": 10**400}, "rope_theta"),
        ("llama", {"rope_theta": float("nan")}, "rope_theta"),
        ("llama", {"rms_norm_eps": True}, "rms_norm_eps"),
        ("llama", {"attention_bias": "false"}, "attention_bias"),
        ("llama", {"tie_word_embeddings": "false"}, "tie_word_embeddings"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantised weights are not read"),
        ("llama", {"max_position_embeddings": 1 << 24}, "too many for 32"),
        ("llama", {"rope_parameters": ["default"]}, "rope_parameters is list"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
        ("llama", {"rope_scaling": {"type": "longrope", "long_factor": []}}, "'long_factor' is not supported"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "factor is None"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor is 0.5"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}}, "truncate"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 2.0, "rope_theta": 1.0}}, "rope_theta"),
        ("llama", {"rope_scaling": {"type": "llama3"} | LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor"),
        ("llama", {"rope_scaling": {"factor": 2.0}, "rope_parameters": {"factor": 3.0}}, "differ in factor"),
        ("glm", {"partial_rotary_factor": 0.04}, "not even"),
        ("glm", {"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        ("qwen2", {"num_key_value_heads": 2, "use_sliding_window": True, "max_window_layers": 2}, "sliding"),
        ("qwen3", {"num_key_value_heads": 2, "layer_types": ["sliding_attention"]}, "layer_types"),
        ("minicpm", {"num_experts": 8}, "num_experts"),
        ("minicpm", {"scale_depth": "deep"}, "scale_depth"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_no_executor_could_compute_is_refused_by_name(kind: str, changes: dict[str, object], message: str) -> None:
    """What changes the mathematics is never ignored, and no number is taken without its range."""
    with pytest.raises(CheckpointError) as caught:
        read(kind, **changes)
    assert message in str(caught.value) and len(str(caught.value)) < 500


def test_end_tokens_of_both_files_count(tmp_path: Path) -> None:
    """A chat model's generation_config.json often names the end of a turn that config.json does not."""
    (tmp_path / "config.json").write_text(json.dumps(SIZES | {"model_type": "llama", "eos_token_id": 7}))
    assert read_architecture(tmp_path).end_token_ids == (7,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 7]}))
    assert read_architecture(tmp_path).end_token_ids == (7, 9)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1000]}))
    with pytest.raises(CheckpointError, match="eos_token_id"):
        read_architecture(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not valid JSON"),
        (b"[]", "JSON is list"),
        (b'{"a": ' + b"[" * 200_000, "not valid JSON"),
        (b'{"a": 1, "a": 2}', "'a' occurs twice"),
        (b'{"a": [' + b"{}," * 200_000 + b"{}]}", "more than 100000 objects"),
        (b"\xff\xfe", "not valid JSON"),
        (b" " * (2 << 20), "larger than"),
        (b'{"vocab_size": ' + b"9" * 100_000 + b"}", "not valid JSON"),
    ],
    ids=["empty", "list", "deep", "twice", "objects", "bytes", "large", "digits"],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, text: bytes, message: str) -> None:
    """Deep, huge, ambiguous or broken JSON ends in one typed error."""
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError) as caught:
        read_architecture(tmp_path)
    assert message in str(caught.value)
