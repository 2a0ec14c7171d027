"""Random GGUF files of a shape, for llama.cpp: F16 first, the rest through llama.cpp's own quantiser.

Runs in its environment: `python -m benchmarks.peers.gguf_models SHAPE FOLDER KIND…`. The quantiser decides which
tensors keep more bits (a tied embedding stays wider in Q4_0), as it does for the files people download.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

from benchmarks.peers.shapes import SHAPES, Shape

KINDS = {
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
}
SPREAD = 0.02  # standard deviation of a fresh matrix, as in the published configurations
CONTEXT = 8192


def write_f16(shape: Shape, path: Path) -> None:
    """Writes the unquantised file, by rename; one tensor in memory at a time."""
    architecture = {"qwen2": "qwen2", "glm": "chatglm", "llama": "llama"}[shape.family]
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(part, architecture)
    writer.add_name(shape.name)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.rotary_size)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("none")  # tokens go in and out as numbers
    layout = list(_tensors(shape))
    for name, dims in layout:
        kind = np.dtype(np.float16 if len(dims) == 2 else np.float32)
        writer.add_tensor_info(name, list(dims), kind, int(np.prod(dims)) * kind.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random = np.random.default_rng(0)
    for name, dims in layout:
        if len(dims) == 2:
            weights = random.standard_normal(dims, dtype=np.float32)
            weights *= SPREAD
            writer.write_tensor_data(weights.astype(np.float16))
        else:
            fill = np.ones if "norm" in name else np.zeros
            writer.write_tensor_data(fill(dims, dtype=np.float32))
    writer.close()
    os.replace(part, path)


def quantise(source: Path, target: Path, kind: str) -> None:
    """llama.cpp's quantiser with its default choices, by rename. Raises RuntimeError."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = KINDS[kind]
    params.nthread = 2
    part = target.with_suffix(".part")
    if llama_cpp.llama_model_quantize(bytes(source), bytes(part), ctypes.byref(params)) != 0:
        raise RuntimeError(f"llama.cpp could not write {target}")
    os.replace(part, target)


def _tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, size = shape.hidden_size, shape.head_dim
    query, key = shape.num_attention_heads * size, shape.num_key_value_heads * size
    yield "token_embd.weight", (shape.vocab_size, hidden)
    yield "output_norm.weight", (hidden,)
    for layer in range(shape.num_hidden_layers):
        block = f"blk.{layer}."
        yield block + "attn_norm.weight", (hidden,)
        if shape.family == "glm":  # this architecture of llama.cpp takes both fused
            yield block + "attn_qkv.weight", (query + 2 * key, hidden)
        else:
            yield block + "attn_q.weight", (query, hidden)
            yield block + "attn_k.weight", (key, hidden)
            yield block + "attn_v.weight", (key, hidden)
        if shape.qkv_bias:
            yield block + "attn_q.bias", (query,)
            yield block + "attn_k.bias", (key,)
            yield block + "attn_v.bias", (key,)
        yield block + "attn_output.weight", (hidden, query)
        yield block + "ffn_norm.weight", (hidden,)
        if shape.family == "glm":
            yield block + "ffn_up.weight", (2 * shape.intermediate_size, hidden)
        else:
            yield block + "ffn_gate.weight", (shape.intermediate_size, hidden)
            yield block + "ffn_up.weight", (shape.intermediate_size, hidden)
        yield block + "ffn_down.weight", (hidden, shape.intermediate_size)


def main(shape_name: str, folder: str, *kinds: str) -> None:
    shape, home = SHAPES[shape_name], Path(folder)
    home.mkdir(parents=True, exist_ok=True)
    source = home / f"{shape.name}-F16.gguf"
    wanted = [kind for kind in kinds if not (home / f"{shape.name}-{kind}.gguf").exists()]
    if wanted and not source.exists():
        write_f16(shape, source)
    for kind in wanted:
        if kind != "F16":
            quantise(source, home / f"{shape.name}-{kind}.gguf", kind)


if __name__ == "__main__":
    main(*sys.argv[1:])
