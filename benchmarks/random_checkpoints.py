"""Random Hugging Face directories of real shapes, written without torch: what a worker opens, packs and serves.

Weights are a repeated tile of bf16 noise. The tokenizer is byte level with as many entries as the model has, so any
token it draws is text.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from benchmarks.peers.shapes import Shape

TILE = 1 << 23
SPREAD = 0.02
CONTEXT = 8192
END = "<|endoftext|>"
KINDS = {
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "glm": ("GlmForCausalLM", "glm"),
    "llama": ("LlamaForCausalLM", "llama"),
}


def write(shape: Shape, folder: Path) -> Path:
    """The directory, by rename; nothing is done when it is there."""
    target = folder / shape.name
    if target.exists():
        return target
    part = folder / f".{shape.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    (part / "config.json").write_text(json.dumps(_config(shape), indent=1))
    (part / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    _write_tokenizer(part, shape.vocab_size)
    _write_weights(part / "model.safetensors", list(_tensors(shape)))
    os.replace(part, target)
    return target


def _config(shape: Shape) -> dict[str, Any]:
    name, kind = KINDS[shape.family]
    config: dict[str, Any] = {
        "architectures": [name],
        "model_type": kind,
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "hidden_act": shape.activation,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_theta": shape.rope_theta,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": shape.tie_word_embeddings,
        "torch_dtype": "bfloat16",
        "eos_token_id": [0],
    }
    if shape.family == "glm":
        config |= {"partial_rotary_factor": shape.rotary_size / shape.head_dim, "attention_bias": False}
    return config


def _tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner = shape.hidden_size, shape.intermediate_size
    query, key = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    yield "model.embed_tokens.weight", (shape.vocab_size, hidden)
    for layer in range(shape.num_hidden_layers):
        base = f"model.layers.{layer}."
        yield base + "input_layernorm.weight", (hidden,)
        yield base + "post_attention_layernorm.weight", (hidden,)
        for name, rows in (("q", query), ("k", key), ("v", key)):
            yield f"{base}self_attn.{name}_proj.weight", (rows, hidden)
            if shape.qkv_bias:
                yield f"{base}self_attn.{name}_proj.bias", (rows,)
        yield base + "self_attn.o_proj.weight", (hidden, query)
        if shape.family == "glm":
            yield base + "mlp.gate_up_proj.weight", (2 * inner, hidden)
        else:
            yield base + "mlp.gate_proj.weight", (inner, hidden)
            yield base + "mlp.up_proj.weight", (inner, hidden)
        yield base + "mlp.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    if not shape.tie_word_embeddings:
        yield "lm_head.weight", (shape.vocab_size, hidden)


def _write_weights(path: Path, tensors: list[tuple[str, tuple[int, ...]]]) -> None:
    header: dict[str, Any] = {}
    at = 0
    for name, dims in tensors:
        size = 2 * int(np.prod(dims))
        header[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    noise = np.random.default_rng(0).standard_normal(TILE, dtype=np.float32) * SPREAD
    tile = (noise.view(np.uint32) >> 16).astype(np.uint16)
    one = (np.ones(1, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for number, (name, dims) in enumerate(tensors):
            left = int(np.prod(dims))
            if len(dims) == 1:
                file.write(np.repeat(one, left).tobytes() if "norm" in name else bytes(2 * left))
                continue
            start = number * 7919 % (TILE // 2)  # so that layers differ
            while left:
                taken = min(left, TILE - start)
                file.write(tile[start : start + taken].tobytes())
                left, start = left - taken, 0


def _write_tokenizer(folder: Path, size: int) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [END, *alphabet, *(f"w{number}" for number in range(size - len(alphabet) - 1))]
    tokenizer = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
