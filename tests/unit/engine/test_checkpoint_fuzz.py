"""Damaged model directories by the hundred: each is refused with a CheckpointError, or is a model.

`AUTOGLM_FUZZ_S=600 pytest --timeout=0 -s` on this file goes on for ten minutes, with new damage each time.
"""

from __future__ import annotations

import json
import os
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from engine.checkpoints.architecture import CheckpointError, present_tensors, tensor_shape
from engine.checkpoints.hf_config import parse
from engine.checkpoints.opening import open_checkpoint
from engine.executors.interface import Span, Wants
from engine.executors.reference import ReferenceExecutor

ROUNDS = 400
SLOW_S = 5.0
"""Processor time; a refusal takes milliseconds."""
MEMORY_BYTES = 256 << 20
CONFIG: dict[str, object] = {
    "model_type": "qwen3", "vocab_size": 11, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "max_position_embeddings": 32,
    "rms_norm_eps": 1e-6, "hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": True,
    "eos_token_id": [0], "rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0},
}  # fmt: skip
ODD = [
    None, True, -1, 0, 1, 2, 7, 1 << 31, 1 << 63, 10**400, 0.5, -0.0, 1e308, float("inf"), float("nan"), "", "F32", "a",
    [], {}, [[]], [1, 2], "../x", "\ud800",
]  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A whole model: a configuration, an index and two shards."""
    arch = parse(CONFIG, tmp_path / "config.json")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    names = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
             "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm", "input_norm": "input_layernorm",
             "post_norm": "post_attention_layernorm", "gate": "mlp.gate_proj", "up": "mlp.up_proj",
             "down": "mlp.down_proj"}  # fmt: skip
    shards = {
        "a.safetensors": {
            "model.embed_tokens.weight": np.ones(tensor_shape(arch, "embedding"), dtype=np.float32),
            "model.norm.weight": np.ones(tensor_shape(arch, "norm"), dtype=np.float16),
        },
        "b.safetensors": {
            f"model.layers.0.{names[name]}.weight": np.ones(tensor_shape(arch, name), dtype=np.float32)
            for name in present_tensors(arch)
        },
    }
    for shard, tensors in shards.items():
        save_file(tensors, tmp_path / shard)
    where = {name: shard for shard, tensors in shards.items() for name in tensors}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return tmp_path


def test_damage_of_any_kind_is_refused_or_harmless(model: Path) -> None:
    """Nothing but CheckpointError is raised, quickly and within a bound of memory."""
    intact = {path: path.read_bytes() for path in model.iterdir()}
    use(model)  # or the rounds would prove nothing
    long_s = float(os.environ.get("AUTOGLM_FUZZ_S", "0"))
    seed = random.SystemRandom().randrange(1 << 60) if long_s else 1
    until, number, refused = time.monotonic() + long_s, 0, 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    while number < ROUNDS or time.monotonic() < until:
        number += 1
        chooser = random.Random(seed + number)
        path = chooser.choice(sorted(intact))
        path.write_bytes(chooser.choice(DAMAGES)(intact[path], chooser))
        start = time.process_time()
        try:
            use(model)
        except CheckpointError as error:
            refused += 1
            assert len(str(error)) < 2000, seed + number
        except Exception as error:
            raise AssertionError(f"seed {seed + number}: {error!r}") from error
        assert time.process_time() - start < SLOW_S, seed + number
        path.write_bytes(intact[path])
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < MEMORY_BYTES
    assert refused > number // 4
    print(f"{number} rounds, {refused} refused")


def use(directory: Path) -> None:
    checkpoint = open_checkpoint(directory, max_bytes=1 << 20)
    try:
        executor = ReferenceExecutor(checkpoint, page_count=1, max_bytes=1 << 20)
        with np.errstate(all="ignore"):
            executor.step([Span([0, 1], 0, [0], Wants.ALL)])
    finally:
        checkpoint.close()


def _flip(data: bytes, chooser: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chooser.choice([1, 1, 2, 8])):
        changed[chooser.randrange(len(changed))] = chooser.randrange(256)
    return bytes(changed)


def _flip_early(data: bytes, chooser: random.Random) -> bytes:
    changed = bytearray(data)
    changed[chooser.randrange(min(len(changed), 300))] = chooser.choice(b'\x00\xff"{}[],:0-9e.')
    return bytes(changed)


def _cut(data: bytes, chooser: random.Random) -> bytes:
    return data[: chooser.randrange(len(data))]


def _grow(data: bytes, chooser: random.Random) -> bytes:
    place = chooser.randrange(len(data))
    return data[:place] + chooser.randbytes(chooser.choice([1, 8, 4096])) + data[place:]


def _repeat(data: bytes, chooser: random.Random) -> bytes:
    start = chooser.randrange(len(data))
    stop = chooser.randrange(start, len(data)) + 1
    return data[:stop] + data[start:stop] * chooser.choice([1, 3]) + data[stop:]


def _other_value(data: bytes, chooser: random.Random) -> bytes:
    """One value of the JSON, whether the file is JSON or begins with it, becomes an odd one; lengths stay right."""
    is_weights = data[:1] != b"{"
    length = int.from_bytes(data[:8], "little") if is_weights else len(data)
    text, rest = (data[8 : 8 + length], data[8 + length :]) if is_weights else (data, b"")
    value = json.loads(text)
    holder = value
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key = chooser.choice(keys)
        inside = holder[key]
        if isinstance(inside, dict | list) and inside and chooser.random() < 0.8:
            holder = inside
            continue
        if chooser.random() < 0.2 and isinstance(holder, dict):
            del holder[key]
        else:
            holder[key] = chooser.choice(ODD)
        break
    changed = json.dumps(value).encode()
    return len(changed).to_bytes(8, "little") + changed + rest if is_weights else changed


DAMAGES: list[Callable[[bytes, random.Random], bytes]] = [
    _flip, _flip_early, _cut, _grow, _repeat, _other_value, _other_value, _other_value,
]  # fmt: skip
