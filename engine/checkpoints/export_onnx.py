"""Writes any opened model as an ONNX decoder graph in float32, built node by node; no torch.

Inputs are `input_ids` int64 [1, tokens] and, with `with_past`, `past.N.key` and `past.N.value` float32
[1, kv_heads, past, head_dim] of each layer (past may be 0); outputs are `logits` [1, tokens, vocab] and then also
`present.N.key` and `present.N.value`. Standard operators of opset 18 only. The arithmetic is that of `Architecture`.
Weights above EXTERNAL_BYTES go to a file beside the graph, `NAME.data`. Needs the dependency group `export`.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from engine.checkpoints.architecture import Checkpoint, CheckpointError, present_tensors
from engine.checkpoints.rope import cos_sin_factor, inverse_frequencies

OPSET = 18
IR_VERSION = 9
EXTERNAL_BYTES = 1 << 30
MAX_PARAMETERS = 8_000_000_000
"""The graph is built in memory: 4 bytes each."""


def export_onnx(checkpoint: Checkpoint, target: Path, with_past: bool = True) -> int:
    """Writes `target`; bytes written. Raises CheckpointError."""
    arch = checkpoint.architecture
    if arch.parameters > MAX_PARAMETERS:
        raise CheckpointError(f"{arch.parameters} parameters; at most {MAX_PARAMETERS} are written as ONNX")
    model = _Graph(checkpoint, with_past).build()
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as name:
            new = Path(name) / target.name
            data = f"{target.name}.data"
            if 4 * arch.parameters > EXTERNAL_BYTES:
                onnx.save_model(model, str(new), save_as_external_data=True, location=data)
                os.replace(new.parent / data, target.parent / data)
            else:
                onnx.save_model(model, str(new))
            size = new.stat().st_size
            os.replace(new, target)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written ({error.strerror or error})") from None
    return size


class _Graph:
    """Nodes and initialisers under construction. Methods that add nodes give back the name of their output."""

    def __init__(self, checkpoint: Checkpoint, with_past: bool) -> None:
        self._checkpoint, self._arch, self._with_past = checkpoint, checkpoint.architecture, with_past
        self._nodes: list[Any] = []
        self._weights: dict[str, Any] = {}

    def build(self) -> Any:
        arch = self._arch
        cos, sin, mask = self._positions()
        self._constant("embedding", self._checkpoint.tensor("embedding"))
        rows = self._add("Gather", "embedding", "input_ids")
        rows = self._scaled(rows, arch.embedding_scale)
        inputs = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, "tokens"])]
        outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, "tokens", arch.vocab_size])]
        for layer in range(arch.num_hidden_layers):
            names = present_tensors(arch)
            mixed = self._attention(layer, self._norm(rows, "input_norm", layer), cos, sin, mask)
            if "post_attention_norm" in names:
                mixed = self._norm(mixed, "post_attention_norm", layer)
            rows = self._add("Add", rows, self._scaled(mixed, arch.residual_scale))
            fed = self._feed_forward(layer, self._norm(rows, "post_norm", layer))
            if "post_mlp_norm" in names:
                fed = self._norm(fed, "post_mlp_norm", layer)
            rows = self._add("Add", rows, self._scaled(fed, arch.residual_scale))
            if self._with_past:
                for kind in ("key", "value"):
                    sizes: list[str | int | None] = [1, arch.num_key_value_heads, "past", arch.head_dim]
                    inputs.append(helper.make_tensor_value_info(f"past.{layer}.{kind}", TensorProto.FLOAT, sizes))
                    sizes = [1, arch.num_key_value_heads, "total", arch.head_dim]
                    outputs.append(helper.make_tensor_value_info(f"present.{layer}.{kind}", TensorProto.FLOAT, sizes))
        final = self._norm(rows, "norm", None)
        if arch.tie_word_embeddings:
            head = self._add("Transpose", "embedding", perm=[1, 0])
        else:
            head = self._constant("head", np.ascontiguousarray(self._checkpoint.tensor("head").T))
        logits = self._scaled(self._add("MatMul", final, head), arch.logit_scale)
        self._nodes.append(helper.make_node("Identity", [logits], ["logits"]))
        graph = helper.make_graph(self._nodes, arch.family, inputs, outputs, list(self._weights.values()))
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="open-autoglm-mesh",
        )

    def _positions(self) -> tuple[str, str, str]:
        """Cosines and sines [tokens, pairs] of the tokens' positions, and the mask [tokens, total]: 0 or -inf."""
        arch = self._arch
        zero, one = self._whole(0), self._whole(1)
        tokens = self._dimension("input_ids", 1)
        past = self._dimension("past.0.key", 2) if self._with_past else zero
        total = self._add("Add", past, tokens)
        mine, every = self._add("Range", past, total, one), self._add("Range", zero, total, one)
        last = self._constant("axis_last", np.array([-1], dtype=np.int64))
        first = self._constant("axis_first", np.array([0], dtype=np.int64))
        column = self._add("Unsqueeze", mine, last)
        allowed = self._add("LessOrEqual", self._add("Unsqueeze", every, first), column)
        mask = self._add(
            "Where", allowed, self._number(0.0), self._constant("minus_infinity", np.array(-np.inf, dtype=np.float32))
        )
        frequencies = self._constant("frequencies", inverse_frequencies(arch).astype(np.float32).reshape(1, -1))
        angles = self._add("Mul", self._add("Cast", column, to=TensorProto.FLOAT), frequencies)
        factor = cos_sin_factor(arch)
        return self._scaled(self._add("Cos", angles), factor), self._scaled(self._add("Sin", angles), factor), mask

    def _attention(self, layer: int, rows: str, cos: str, sin: str, mask: str) -> str:
        arch = self._arch
        kv_heads, size = arch.num_key_value_heads, arch.head_dim
        query = self._rotated(self._heads(layer, rows, "q", arch.num_attention_heads), cos, sin)
        key = self._rotated(self._heads(layer, rows, "k", kv_heads), cos, sin)
        value = self._heads(layer, rows, "v", kv_heads)
        if self._with_past:
            key = self._add("Concat", f"past.{layer}.key", key, axis=2, output=f"present.{layer}.key")
            value = self._add("Concat", f"past.{layer}.value", value, axis=2, output=f"present.{layer}.value")
        # Queries that share a key-value head: [1, kv_heads, group, tokens, size].
        group = arch.num_attention_heads // kv_heads
        query = self._add("Reshape", query, self._shape(1, kv_heads, group, -1, size))
        axis = self._constant("axis_group", np.array([2], dtype=np.int64))
        turned = self._add("Unsqueeze", self._add("Transpose", key, perm=[0, 1, 3, 2]), axis)
        scores = self._add("Mul", self._add("MatMul", query, turned), self._number(size**-0.5))
        weights = self._add("Softmax", self._add("Add", scores, mask), axis=-1)
        mixed = self._add("MatMul", weights, self._add("Unsqueeze", value, axis))
        mixed = self._add("Reshape", mixed, self._shape(1, arch.num_attention_heads, -1, size))
        mixed = self._add("Transpose", mixed, perm=[0, 2, 1, 3])
        mixed = self._add("Reshape", mixed, self._shape(1, -1, arch.num_attention_heads * size))
        return self._linear(layer, mixed, "o")

    def _heads(self, layer: int, rows: str, name: str, heads: int) -> str:
        """[1, heads, tokens, head_dim], normed where the architecture does that."""
        split = self._add("Reshape", self._linear(layer, rows, name), self._shape(1, -1, heads, self._arch.head_dim))
        if self._arch.qk_norm and name in ("q", "k"):
            split = self._norm(split, f"{name}_norm", layer)
        return self._add("Transpose", split, perm=[0, 2, 1, 3])

    def _rotated(self, heads: str, cos: str, sin: str) -> str:
        arch = self._arch
        size, half = arch.rotary_size, arch.rotary_size // 2
        if size == 0:
            return heads
        if arch.rotary_interleaved:
            first, second = self._slice(heads, 0, size, 2), self._slice(heads, 1, size, 2)
        else:
            first, second = self._slice(heads, 0, half, 1), self._slice(heads, half, size, 1)
        left = self._add("Sub", self._add("Mul", first, cos), self._add("Mul", second, sin))
        right = self._add("Add", self._add("Mul", second, cos), self._add("Mul", first, sin))
        if arch.rotary_interleaved:
            axis = self._constant("axis_last", np.array([-1], dtype=np.int64))
            pairs = self._add(
                "Concat", self._add("Unsqueeze", left, axis), self._add("Unsqueeze", right, axis), axis=-1
            )
            turned = self._add("Reshape", pairs, self._shape(0, 0, 0, size))
        else:
            turned = self._add("Concat", left, right, axis=-1)
        if size == arch.head_dim:
            return turned
        return self._add("Concat", turned, self._slice(heads, size, arch.head_dim, 1), axis=-1)

    def _feed_forward(self, layer: int, rows: str) -> str:
        gate, up = self._linear(layer, rows, "gate"), self._linear(layer, rows, "up")
        return self._linear(layer, self._add("Mul", self._activated(gate), up), "down")

    def _activated(self, gate: str) -> str:
        arch = self._arch
        if arch.activation == "silu":
            return self._add("Mul", gate, self._add("Sigmoid", gate))
        if arch.activation == "gelu_tanh":
            cube = self._add("Mul", self._add("Mul", gate, gate), gate)
            inner = self._add("Add", gate, self._scaled(cube, 0.044715))
            curve = self._add("Tanh", self._scaled(inner, (2 / np.pi) ** 0.5))
            return self._add("Mul", self._scaled(gate, 0.5), self._add("Add", curve, self._number(1.0)))
        if arch.activation_threshold:
            passes = self._add("Greater", gate, self._number(arch.activation_threshold))
            return self._add("Where", passes, gate, self._number(0.0))
        active = self._add("Relu", gate)
        return self._add("Mul", active, active) if arch.activation == "relu2" else active

    def _norm(self, rows: str, name: str, layer: int | None) -> str:
        last = self._constant("axis_last", np.array([-1], dtype=np.int64))
        mean = self._add("ReduceMean", self._add("Mul", rows, rows), last, keepdims=1)
        root = self._add("Sqrt", self._add("Add", mean, self._number(self._arch.rms_norm_eps)))
        stored = self._constant(name if layer is None else f"{layer}.{name}", self._checkpoint.tensor(name, layer))
        return self._add("Mul", self._add("Div", rows, root), stored)

    def _linear(self, layer: int, rows: str, name: str) -> str:
        weight = np.ascontiguousarray(self._checkpoint.tensor(name, layer).T)
        out = self._add("MatMul", rows, self._constant(f"{layer}.{name}", weight))
        if f"{name}_bias" in present_tensors(self._arch):
            bias = self._constant(f"{layer}.{name}_bias", self._checkpoint.tensor(f"{name}_bias", layer))
            out = self._add("Add", out, bias)
        return out

    def _scaled(self, rows: str, factor: float) -> str:
        return rows if factor == 1.0 else self._add("Mul", rows, self._number(factor))

    def _slice(self, rows: str, start: int, stop: int, step: int) -> str:
        places = [self._shape(each) for each in (start, stop, -1, step)]
        return self._add("Slice", rows, *places)

    def _dimension(self, of: str, axis: int) -> str:
        """A scalar: how long `of` is along `axis`."""
        return self._add("Gather", self._add("Shape", of), self._whole(axis))

    def _add(self, kind: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        output = output or f"node_{len(self._nodes)}_{kind.lower()}"
        self._nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    def _constant(self, name: str, value: npt.NDArray[Any]) -> str:
        if name not in self._weights:
            self._weights[name] = numpy_helper.from_array(value, name)
        return name

    def _whole(self, value: int) -> str:
        return self._constant(f"whole_{value}", np.array(value, dtype=np.int64))

    def _number(self, value: float) -> str:
        return self._constant(f"number_{value!r}", np.array(value, dtype=np.float32))

    def _shape(self, *sizes: int) -> str:
        """A vector of whole numbers. For Reshape, 0 means the size that the input has there."""
        return self._constant(f"shape_{'_'.join(map(str, sizes))}", np.array(sizes, dtype=np.int64))
