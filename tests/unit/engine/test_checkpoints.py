"""Model directories from strangers: a clear refusal, quickly and in little memory; and digests that tell the truth."""

from __future__ import annotations

import json
import os
import resource
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from engine.checkpoints import variant
from engine.checkpoints.architecture import Checkpoint, CheckpointError
from engine.checkpoints.digest_cache import DigestCache
from engine.checkpoints.opening import open_checkpoint
from engine.executors.reference import ReferenceExecutor

CONFIG: dict[str, object] = {
    "model_type": "glm", "vocab_size": 11, "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 2, "partial_rotary_factor": 1.0,
    "max_position_embeddings": 32, "attention_bias": False, "tie_word_embeddings": True, "eos_token_id": [0],
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
INDEX = "model.safetensors.index.json"
MEMORY_BYTES = 64 << 20
QUICK_S = 5.0
"""A refusal takes milliseconds; a second is promised, and a busy machine may take five times as long."""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write(tmp_path)
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The same model in two files."""
    write(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    names = sorted(SHAPES)
    shards = {"model-00001-of-00002.safetensors": names[:4], "model-00002-of-00002.safetensors": names[4:]}
    for shard, inside in shards.items():
        save_file({name: values(name) for name in inside}, tmp_path / shard)
    index(tmp_path, {name: shard for shard, inside in shards.items() for name in inside})
    return tmp_path


def values(name: str, dtype: str = "float32") -> np.ndarray:
    """Every tensor has other values, and every element."""
    start = sorted(SHAPES).index(name)
    return (np.arange(np.prod(SHAPES[name])).reshape(SHAPES[name]) + start).astype(dtype)


def write(directory: Path, dtype: str = "float32", **changes: object) -> None:
    (directory / "config.json").write_text(json.dumps(CONFIG | changes))
    (directory / "tokenizer.json").write_text("{}")
    save_file({name: values(name, dtype) for name in SHAPES}, directory / "model.safetensors")


def index(directory: Path, where: object) -> None:
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def read_all(checkpoint: Checkpoint) -> None:
    ReferenceExecutor(checkpoint, page_count=1)


def refused(directory: Path) -> str:
    """The refusal's text. Fails when it took more memory or time than a small file can need."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(CheckpointError) as caught:
        read_all(variant.load(directory, "float32").checkpoint)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < MEMORY_BYTES
    assert time.process_time() - start < QUICK_S
    assert len(str(caught.value)) < 1000 + 2 * len(str(directory))
    return str(caught.value)


def header(path: Path, text: bytes, data: bytes = b"") -> None:
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def edit_header(path: Path, change: Callable[[dict[str, dict[str, object]]], object]) -> None:
    """Changes the header and leaves the bytes behind it."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    entries = json.loads(raw[8 : 8 + length])
    change(entries)
    header(path, json.dumps(entries).encode(), raw[8 + length :])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_tensors_have_the_values_that_were_written(model: Path, dtype: str) -> None:
    """All three formats, whole and in rows, gate and up taken apart."""
    import ml_dtypes  # noqa: F401  # teaches numpy the name "bfloat16"

    write(model, dtype)
    checkpoint = open_checkpoint(model)
    gate_up = values("model.layers.0.mlp.gate_up_proj.weight")
    assert np.array_equal(checkpoint.tensor("embedding"), values("model.embed_tokens.weight"))
    assert np.array_equal(checkpoint.tensor("gate", 0), gate_up[:6])
    assert np.array_equal(checkpoint.tensor("up", 0), gate_up[6:])
    assert np.array_equal(checkpoint.rows("up", 2, 5, 0), gate_up[8:11])
    assert checkpoint.rows("up", 3, 3, 0).shape == (0, 4)
    assert np.array_equal(checkpoint.tensor("norm"), values("model.norm.weight"))
    with pytest.raises(CheckpointError, match="rows 0 to 6, not 2 to 7"):
        checkpoint.rows("gate", 2, 7, 0)
    for name, layer in (("head", None), ("q_bias", 0), ("q", 1), ("q", None), ("nonsense", 0)):
        with pytest.raises(CheckpointError, match="this model has no tensor"):
            checkpoint.tensor(name, layer)
    checkpoint.close()
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.tensor("embedding")


def test_shards_are_one_model(sharded: Path) -> None:
    """Several files with an index read like one, and their digest depends on each."""
    checkpoint = open_checkpoint(sharded)
    assert np.array_equal(checkpoint.tensor("embedding"), values("model.embed_tokens.weight"))
    assert np.array_equal(checkpoint.tensor("down", 0), values("model.layers.0.mlp.down_proj.weight"))
    before = checkpoint.weight_files_digest
    edit = sharded / "model-00002-of-00002.safetensors"
    edit.write_bytes(edit.read_bytes()[:-1] + b"\x01")
    assert open_checkpoint(sharded).weight_files_digest != before


def test_rows_of_a_large_tensor_do_not_bring_the_rest_into_memory(model: Path) -> None:
    """Opening and reading in pieces takes little, whatever the file weighs (here 1.6 GB, nearly all of it a hole)."""
    (model / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 2_000_000, "hidden_size": 200}))
    wide = {
        "model.embed_tokens.weight": (2_000_000, 200),
        "model.layers.0.self_attn.o_proj.weight": (200, 4),
        "model.layers.0.mlp.down_proj.weight": (200, 6),
    }
    path, position, entries = model / "model.safetensors", 0, {}
    for name, small in SHAPES.items():
        shape = wide.get(name, (*small[:-1], 200))
        size = 4 * int(np.prod(shape))
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [position, position + size]}
        position += size
    header(path, json.dumps(entries).encode())
    os.truncate(path, path.stat().st_size + position)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    checkpoint = open_checkpoint(model)
    for start in (0, 1_000_000, 1_999_000):
        assert not checkpoint.rows("embedding", start, start + 1000).any()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < MEMORY_BYTES


def test_the_size_of_the_files_is_bounded(model: Path) -> None:
    """A setting says how large the weights may be."""
    with pytest.raises(CheckpointError, match="at most 500 "):
        variant.load(model, "float32", 500)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64", "float64", "bool"])
def test_numbers_that_are_no_weights_are_refused(model: Path, dtype: str) -> None:
    """Integers without their scales would be garbage, silently; float64 would lose bits, silently."""
    write(model, dtype)
    assert "this reader takes F32, F16, BF16" in refused(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 65_536, "vocab_size": 2_000_000}, "shape"),
        ({"intermediate_size": 7}, "gate_up_proj.weight has shape (12, 4), the configuration wants (14, 4)"),
        ({"tie_word_embeddings": False}, "lm_head.weight is missing"),
        ({"attention_bias": True}, "q_proj.bias is missing"),
        ({"num_hidden_layers": 1024}, "model.layers.1.input_layernorm.weight is missing"),
        ({"model_type": "llama"}, "gate_proj.weight is missing"),
        ({"model_type": "glm4"}, "post_self_attn_layernorm.weight is missing"),
        ({"model_type": "bert"}, "model_type is 'bert'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_configuration_that_lies_is_refused(model: Path, changes: dict[str, object], message: str) -> None:
    """Named, before anything of the size it claims is allocated."""
    (model / "config.json").write_text(json.dumps(CONFIG | changes))
    assert message in refused(model)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b""), "too few for its header"),
        (lambda path: path.write_bytes(b"\xff" * 64), "header has"),
        (lambda path: path.write_bytes(b"\x10" + bytes(7) + b"{}"), "too few for its header"),
        (lambda path: header(path, b" " * (5 << 20) + b"{}"), "header has 5242882 bytes"),
        (lambda path: header(path, b'{"a":' + b"[" * 100_000), "not valid JSON"),
        (lambda path: header(path, b'{"a":{},"a":{}}'), "'a' occurs twice"),
        (lambda path: header(path, json.dumps({str(n): {} for n in range(20_000)}).encode()), "20000 tensors"),
        (lambda path: header(path, b'{"a":[]}'), "a has no description"),
        (lambda path: (path.unlink(), path.mkdir()), "not a regular file"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "not a regular file"),
        (lambda path: (path.unlink(), path.symlink_to("/dev/zero")), "not a regular file"),
        (lambda path: (path.unlink(), path.symlink_to(path)), "symbolic links"),
        (lambda path: path.unlink(), "no such file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "lies at bytes"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "its header promises"),
    ],
    ids=["empty", "noise", "short", "huge", "deep", "twice", "many", "list", "directory", "pipe", "device", "loop",
         "none", "truncated", "longer"],
)  # fmt: skip
def test_a_weights_file_that_is_none_is_refused(model: Path, damage: Callable[[Path], object], message: str) -> None:
    """Noise, traps and special files end in one typed error, never in a hang or a full memory."""
    damage(model / "model.safetensors")
    assert message in refused(model)


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"shape": [-1]}, "has the shape"),
        ({"shape": [2.0, 2]}, "has the shape"),
        ({"shape": [True] * 4}, "has the shape"),
        ({"shape": [1 << 62, 8]}, "has the shape"),
        ({"shape": [1] * 1000}, "has the shape"),
        ({"shape": [3]}, "cannot have 16 bytes"),
        ({"shape": [2, 2]}, "the configuration wants (4,)"),
        ({"dtype": "F16"}, "cannot have 16 bytes"),
        ({"dtype": "F4"}, "this reader takes"),
        ({"dtype": ["F32"]}, "has no dtype"),
        ({"data_offsets": [0, 16]}, "starts at byte"),
        ({"data_offsets": [-16, 0]}, "has the offsets"),
        ({"data_offsets": [16, 0]}, "lies at bytes"),
        ({"data_offsets": [0, 1 << 63]}, "has the offsets"),
        ({"data_offsets": "all"}, "has the offsets"),
    ],
    ids=str,
)
def test_a_header_that_lies_is_refused(model: Path, entry: Mapping[str, object], message: str) -> None:
    """Shapes, types and places that contradict the file: no overlap, no reading beyond it, no overflow."""
    edit_header(model / "model.safetensors", lambda entries: entries[NORM].update(entry))
    assert message in refused(model)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({NORM: "../model.safetensors"}, "no plain name"),
        ({NORM: "/etc/passwd"}, "no plain name"),
        ({NORM: "sub/model.safetensors"}, "no plain name"),
        ({NORM: "..\\model.safetensors"}, "no plain name"),
        ({NORM: ".safetensors"}, "no plain name"),
        ({NORM: "model.safetensors\n"}, "no plain name"),
        ({NORM: "model.bin"}, "no plain name"),
        ({NORM: 7}, "no plain name"),
        ({NORM: "absent.safetensors"}, "no such file"),
        ({NORM: "model-00001-of-00002.safetensors"}, f"{NORM} is not in"),
        ({}, "weight_map"),
        (["model.safetensors"], "weight_map"),
        ({f"t{n}": f"s{n}.safetensors" for n in range(300)}, "at most 256"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_an_index_that_points_elsewhere_is_refused(sharded: Path, where: object, message: str) -> None:
    """Shards are plain files beside the index, and hold what it says."""
    index(sharded, where)
    assert message in refused(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    """Which one is meant cannot be known."""
    first, second = sorted(sharded.glob("model-*.safetensors"))
    second.write_bytes(first.read_bytes())
    assert "is in model-00001-of-00002.safetensors too" in refused(sharded)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json", INDEX])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_text_files_must_be_files(model: Path, name: str, kind: str) -> None:
    """A pipe would block the start for ever, a device would fill the memory."""
    (model / name).unlink(missing_ok=True)
    if name == INDEX:
        (model / "model.safetensors").unlink()
    if kind == "pipe":
        os.mkfifo(model / name)
    else:
        (model / name).symlink_to("/dev/zero")
    assert "not a regular file" in refused(model)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_weights_that_are_no_numbers_are_refused(model: Path, value: float, dtype: str) -> None:
    """The tensor is named, whichever way it is read."""
    tensors = {name: values(name, dtype) for name in SHAPES}
    tensors[NORM][1] = value
    save_file(tensors, model / "model.safetensors")
    assert f"{NORM} holds NaN or infinity" in refused(model)
    with pytest.raises(CheckpointError, match="holds NaN or infinity"):
        open_checkpoint(model).rows("norm", 1, 2)


def test_a_file_that_is_cut_short_after_it_was_opened_is_an_error(model: Path) -> None:
    """Not a bus error, which would end the process."""
    checkpoint = open_checkpoint(model)
    os.truncate(model / "model.safetensors", 1000)
    with pytest.raises(CheckpointError, match="cut short"):
        read_all(checkpoint)


def test_links_to_files_are_followed(sharded: Path) -> None:
    """Hubs keep the files elsewhere and link to them."""
    for name in ("config.json", "model-00001-of-00002.safetensors", INDEX, "tokenizer.json"):
        (sharded / name).rename(sharded / f"blob-{name}")
        (sharded / name).symlink_to(f"blob-{name}")
    assert variant.load(sharded, "float32").digest.startswith("sha256:")


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
    tensors = {name: values(name) for name in SHAPES}
    tensors[NORM][1] += 2
    save_file(tensors, model / "model.safetensors")
    digests.append(variant.load(model, "float32").digest)
    assert len(set(digests)) == len(digests)
    assert variant.load(model, "float32").digest == digests[-1]


def test_a_remembered_digest_is_the_same_digest(sharded: Path) -> None:
    """Hashing the weights anew or not makes no other variant."""
    for path in sharded.iterdir():
        os.utime(path, (1.0, 1.0))  # files just written are not remembered
    digests = DigestCache(sharded / "digests")
    expected = variant.load(sharded, "float32").digest
    assert [variant.load(sharded, "float32", digests=digests).digest for _ in range(2)] == [expected] * 2
    assert len(list((sharded / "digests").iterdir())) == 2


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"])
def test_files_that_change_while_they_are_read_are_refused(model: Path, name: str) -> None:
    """Weights exported anew during a start must not be served under the digest of others."""
    loaded = variant.load(model, "float32")
    read_all(loaded.checkpoint)
    loaded.check_unchanged()
    (model / name).write_bytes(b"{}")
    with pytest.raises(CheckpointError, match=f"{name} changed while the model was read"):
        loaded.check_unchanged()


def test_a_missing_gguf_file_is_named(tmp_path: Path) -> None:
    """A file name that ends in .gguf is that format, whether or not it can be read."""
    with pytest.raises(CheckpointError, match=r"absent\.gguf"):
        open_checkpoint(tmp_path / "absent.gguf")
