"""Model directories from strangers: a clear refusal, quickly and in little memory; and digests that tell the truth."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from engine.checkpoints import glm, variant

CONFIG: dict[str, object] = {
    "model_type": "glm", "vocab_size": 11, "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 2, "max_position_embeddings": 32,
    "tie_word_embeddings": True, "eos_token_id": [0],
}  # fmt: skip
SHAPES = {
    "model.embed_tokens.weight": (11, 4),
    "model.norm.weight": (4,),
    "model.layers.0.input_layernorm.weight": (4,),
    "model.layers.0.post_attention_layernorm.weight": (4,),
    "model.layers.0.self_attn.q_proj.weight": (4, 4),
    "model.layers.0.self_attn.k_proj.weight": (2, 4),
    "model.layers.0.self_attn.v_proj.weight": (2, 4),
    "model.layers.0.self_attn.o_proj.weight": (4, 4),
    "model.layers.0.mlp.gate_up_proj.weight": (12, 4),
    "model.layers.0.mlp.down_proj.weight": (4, 6),
}
MEMORY_BYTES = 64 << 20


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write(tmp_path)
    return tmp_path


def write(directory: Path, dtype: str = "float32", **changes: object) -> None:
    (directory / "config.json").write_text(json.dumps(CONFIG | changes))
    (directory / "tokenizer.json").write_text("{}")
    ones = {name: np.ones(shape, dtype=dtype) for name, shape in SHAPES.items()}
    save_file(ones, directory / "model.safetensors")


def refused(directory: Path) -> str:
    """The refusal's text. Fails when it took more memory than a small file can need."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(glm.CheckpointError) as caught:
        variant.load(directory, "float32")
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < MEMORY_BYTES
    return str(caught.value)


def arrays(weights: glm.GlmWeights) -> list[np.ndarray]:
    each = [weights.embedding, weights.head, weights.norm]
    for layer in weights.layers:
        each += [layer.input_norm, layer.qkv, layer.o, layer.post_norm, layer.gate_up, layer.down]
    return each


def header(path: Path, text: bytes) -> None:
    path.write_bytes(len(text).to_bytes(8, "little") + text)


def test_a_small_model_is_read_and_weighs_what_its_configuration_says(model: Path) -> None:
    """The bound on memory is checked against the configuration, so the two must agree."""
    weights = glm.load(model)
    assert weights.config.weight_bytes == weights.resident_bytes == sum(a.nbytes for a in arrays(weights))
    with pytest.raises(glm.CheckpointError, match="at most 500 "):
        variant.load(model, "float32", 500)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64", "float64", "bool"])
def test_numbers_that_are_no_weights_are_refused(model: Path, dtype: str) -> None:
    """Integers without their scales would be garbage, silently; float64 would lose bits, silently."""
    write(model, dtype)
    assert "this reader takes F32, F16, BF16" in refused(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": ["default"]}, "rope_parameters is list"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_type 'linear'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type 'yarn'"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"rms_norm_eps": True}, "rms_norm_eps"),
        ({"attention_bias": "false"}, "attention_bias"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings"),
        ({"eos_token_id": [True]}, "eos_token_id"),
        ({"max_position_embeddings": 1 << 20, "head_dim": 1024}, "max_position_embeddings"),
        ({"hidden_size": 65_536, "vocab_size": 2_000_000}, "at most"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_configuration_that_lies_is_refused(model: Path, changes: dict[str, object], message: str) -> None:
    """Named, before anything of the size it claims is allocated; what changes the mathematics is never ignored."""
    (model / "config.json").write_text(json.dumps(CONFIG | changes))
    assert message in refused(model)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b""), "not a readable safetensors file"),
        (lambda path: path.write_bytes(b"\xff" * 64), "header has"),
        (lambda path: header(path, b" " * (5 << 20) + b"{}"), "header has 5242882 bytes"),
        (lambda path: header(path, b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}    '), "not a readable"),
        (lambda path: header(path, b'{"a":{"dtype":"F32","shape":[4611686018427387904,8],"data_offsets":[0,4]}}'),
         "not a readable"),
        (lambda path: header(path, b'{"a":' + b"[" * 100_000), "not a readable"),
        (lambda path: (path.unlink(), path.mkdir()), "not a regular file"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "not a regular file"),
        (lambda path: (path.unlink(), path.symlink_to("/dev/zero")), "not a regular file"),
        (lambda path: (path.unlink(), path.symlink_to(path)), "symbolic links"),
        (lambda path: path.unlink(), "no such file"),
    ],
    ids=["empty", "noise", "huge", "negative", "overflow", "deep", "directory", "pipe", "device", "loop", "none"],
)  # fmt: skip
def test_a_weights_file_that_is_none_is_refused(model: Path, damage: Callable[[Path], object], message: str) -> None:
    """Noise, traps and special files end in one typed error, never in a hang or a full memory."""
    damage(model / "model.safetensors")
    assert message in refused(model)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_text_files_must_be_files(model: Path, name: str, kind: str) -> None:
    """A pipe would block the start for ever, a device would fill the memory."""
    (model / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(model / name)
    else:
        (model / name).symlink_to("/dev/zero")
    assert "not a regular file" in refused(model)


def test_nan_is_refused(model: Path) -> None:
    """A weight that is no number is named."""
    tensors = {name: np.ones(shape, dtype=np.float32) for name, shape in SHAPES.items()}
    tensors["model.norm.weight"][1] = np.nan
    save_file(tensors, model / "model.safetensors")
    assert "model.norm.weight holds NaN" in refused(model)


def test_links_to_files_are_followed(model: Path) -> None:
    """Hubs keep the files elsewhere and link to them."""
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (model / name).rename(model / f"blob-{name}")
        (model / name).symlink_to(f"blob-{name}")
    assert variant.load(model, "float32").digest.startswith("sha256:")


def test_the_digest_changes_with_everything_that_may_change_tokens(model: Path) -> None:
    """Weights, configuration, vocabulary, template, generation settings, arithmetic: each alone is another variant."""
    digests = [variant.load(model, "float32").digest, variant.load(model, "int8").digest]

    def changed(name: str, content: str) -> None:
        (model / name).write_text(content)
        digests.append(variant.load(model, "float32").digest)

    changed("tokenizer.json", '{"version": 2}')
    changed("tokenizer_config.json", "{}")
    changed("chat_template.jinja", "hello")
    changed("chat_template.jinja", "hello!")
    changed("generation_config.json", '{"eos_token_id": 1}')
    changed("generation_config.json", '{"eos_token_id": 2}')
    changed("config.json", json.dumps(CONFIG | {"rope_theta": 5000.0}))
    changed("config.json", json.dumps(CONFIG | {"eos_token_id": [1]}))
    tensors = {name: np.ones(shape, dtype=np.float32) for name, shape in SHAPES.items()}
    tensors["model.norm.weight"][1] = 2
    save_file(tensors, model / "model.safetensors")
    digests.append(variant.load(model, "float32").digest)
    assert len(set(digests)) == len(digests)
    assert variant.load(model, "float32").digest == digests[-1]


def test_files_that_change_while_they_are_read_are_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights exported anew during a start must not be served under the digest of others."""
    load = glm.load

    def load_and_replace(*args: object) -> glm.GlmWeights:
        weights = load(*args)  # type: ignore[arg-type]
        write(model, "float16")
        return weights

    monkeypatch.setattr(variant.glm, "load", load_and_replace)
    assert "changed while they were read" in refused(model)
