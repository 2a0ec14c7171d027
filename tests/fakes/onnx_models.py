"""Small ONNX models for tests, built with the `onnx` package: a convolution, a product, texts, open sizes, traps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper, save

Shape = list[int | str | None]


def model(
    nodes: list[object],
    inputs: list[tuple[str, int, Shape]],
    outputs: list[tuple[str, int, Shape | None]],
    weights: dict[str, np.ndarray] | None = None,
    domains: tuple[str, ...] = (),
) -> ModelProto:
    """One graph of the default domain at opset 19, with `domains` imported beside it."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(*each) for each in inputs],
        [helper.make_tensor_value_info(*each) for each in outputs],
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    opsets = [helper.make_opsetid("", 19), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def convolution() -> ModelProto:
    """[n, 1, h, w] float32 → 2 channels of a 3×3 filter, and their means."""
    weight = np.arange(18, dtype=np.float32).reshape(2, 1, 3, 3) / 10
    nodes = [
        helper.make_node("Conv", ["image", "weight"], ["features"], pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["features"], ["mean"]),
    ]
    return model(
        nodes,
        [("image", TensorProto.FLOAT, ["n", 1, "h", "w"])],
        [("features", TensorProto.FLOAT, ["n", 2, "h", "w"]), ("mean", TensorProto.FLOAT, ["n", 2, 1, 1])],
        {"weight": weight},
    )


def product() -> ModelProto:
    """[n, 3] float32 · a fixed [3, 2] matrix."""
    weight = np.array([[1, 2], [3, 4], [5, 6]], np.float32)
    node = helper.make_node("MatMul", ["x", "weight"], ["y"])
    return model([node], [("x", TensorProto.FLOAT, ["n", 3])], [("y", TensorProto.FLOAT, ["n", 2])], {"weight": weight})


def identity(kind: int, shape: Shape | None = None) -> ModelProto:
    """Gives back a tensor of type `kind`."""
    dims: Shape = [None, None] if shape is None else shape
    return model([helper.make_node("Identity", ["x"], ["y"])], [("x", kind, dims)], [("y", kind, dims)])


def zeros() -> ModelProto:
    """A shape → zeros of it: a small request with an answer of any size."""
    node = helper.make_node("ConstantOfShape", ["shape"], ["zeros"])
    return model([node], [("shape", TensorProto.INT64, ["rank"])], [("zeros", TensorProto.FLOAT, None)])


def lookup() -> ModelProto:
    """Rows of a table of four; any other index cannot be computed."""
    node = helper.make_node("Gather", ["table", "row"], ["y"], name="rows")
    table = np.arange(8, dtype=np.float32).reshape(4, 2)
    return model([node], [("row", TensorProto.INT64, ["n"])], [("y", TensorProto.FLOAT, ["n", 2])], {"table": table})


def endless() -> ModelProto:
    """Counts to `limit` one by one; with a large limit it never ends by itself."""
    step = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go_on"]),
            helper.make_node("Add", ["sum_in", "one"], ["sum_out"]),
        ],
        "step",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum_in", TensorProto.INT64, []),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum_out", TensorProto.INT64, []),
        ],
    )
    node = helper.make_node("Loop", ["limit", "yes", "zero"], ["count"], body=step)
    return model(
        [node],
        [("limit", TensorProto.INT64, [])],
        [("count", TensorProto.INT64, [])],
        {"yes": np.array(True), "zero": np.array(0, np.int64), "one": np.array(1, np.int64)},
    )


def write(path: Path, made: ModelProto) -> Path:
    """Writes a model as one file."""
    path.write_bytes(made.SerializeToString())
    return path


def write_external(path: Path, made: ModelProto, location: str) -> Path:
    """Writes a model whose weights lie in a second file named `location`."""
    save(made, path, save_as_external_data=True, all_tensors_to_one_file=True, location=location, size_threshold=0)
    return path


def rename_external(path: Path, location: str, **entries: str) -> Path:
    """Makes every external tensor of the file at `path` name `location`, and other `entries`, whatever they mean."""
    made = ModelProto.FromString(path.read_bytes())
    for tensor in made.graph.initializer:
        for entry in tensor.external_data:
            entry.value = {"location": location, **entries}.get(entry.key, entry.value)
    return write(path, made)
