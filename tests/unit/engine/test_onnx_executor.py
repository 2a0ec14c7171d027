"""ONNX models compute what they say, within bounds, and a mistake is the caller's typed error."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator

from engine.checkpoints.architecture import CheckpointError
from engine.executors.onnx import Cancelled, InputError, Limits, OnnxModel, Run, TooLarge
from tests.fakes import onnx_models as models

ARENA = 64 << 20
"""One arena per process: the first load of this process sets it, so every test loads with the same."""


def load(tmp_path: Path, made: Any, **limits: int) -> OnnxModel:
    return OnnxModel.load(models.write(tmp_path / "m.onnx", made), Limits(**{"arena_bytes": ARENA, **limits}))


def test_results_are_the_reference_evaluators(tmp_path: Path) -> None:
    """A small convolution net agrees with the onnx package's own evaluator, for several sizes."""
    made = models.convolution()
    model, reference = load(tmp_path, made), ReferenceEvaluator(made)
    for shape in ((1, 1, 3, 3), (2, 1, 5, 7), (0, 1, 4, 4)):
        image = np.random.default_rng(0).standard_normal(shape, np.float32)
        ours = model.run({"image": image}, [], Run())
        if shape[0]:
            for mine, theirs in zip(ours, reference.run(None, {"image": image}), strict=True):
                np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)
        assert [array.shape for array in ours] == [(shape[0], 2, *shape[2:]), (shape[0], 2, 1, 1)]


def test_outputs_come_by_name(tmp_path: Path) -> None:
    """Only what was asked for, in the order asked for."""
    model = load(tmp_path, models.convolution())
    image = np.ones((1, 1, 3, 3), np.float32)
    mean, features = model.run({"image": image}, ["mean", "features"], Run())
    assert mean.shape == (1, 2, 1, 1) and features.shape == (1, 2, 3, 3)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (TensorProto.BOOL, np.bool_), (TensorProto.INT8, np.int8), (TensorProto.INT16, np.int16),
        (TensorProto.INT32, np.int32), (TensorProto.INT64, np.int64), (TensorProto.UINT8, np.uint8),
        (TensorProto.UINT16, np.uint16), (TensorProto.UINT32, np.uint32), (TensorProto.UINT64, np.uint64),
        (TensorProto.FLOAT16, np.float16), (TensorProto.FLOAT, np.float32), (TensorProto.DOUBLE, np.float64),
        (TensorProto.BFLOAT16, ml_dtypes.bfloat16), (TensorProto.STRING, object),
    ],
)  # fmt: skip
def test_every_type_goes_in_and_comes_out(tmp_path: Path, kind: int, dtype: Any) -> None:
    """Identity gives back each type bit for bit, empty tensors too."""
    model = load(tmp_path, models.identity(kind))
    values = [["a", ""], ["ü", "\0b"]] if dtype is object else [[0, 1], [1, 0]]
    for array in (np.array(values, dtype), np.empty((0, 2), dtype), np.array(values, dtype).T):
        (out,) = model.run({"x": array}, [], Run())
        assert out.dtype == array.dtype and out.shape == array.shape and (out == array).all()


@pytest.mark.parametrize(
    ("feeds", "outputs", "text"),
    [
        ({}, [], "input 'x' is missing"),
        ({"x": np.ones((1, 3), np.float32), "z": np.ones(1)}, [], "'z' does not exist; there are 'x'"),
        ({"x": np.ones((1, 4), np.float32)}, [], "has shape [1, 4], the model takes [-1, 3]"),
        ({"x": np.ones(3, np.float32)}, [], "has shape [3], the model takes [-1, 3]"),
        ({"x": np.ones((1, 3), np.float64)}, [], "is float64, the model takes float32"),
        ({"x": np.ones((1, 3), np.float32)}, ["nope"], "output 'nope' does not exist; there are 'y'"),
    ],
)
def test_mistakes_name_the_tensor_and_what_is_expected(
    tmp_path: Path, feeds: dict[str, Any], outputs: list[str], text: str
) -> None:
    """Names, types and shapes are checked against what the model declares."""
    with pytest.raises(InputError) as caught:
        load(tmp_path, models.product()).run(feeds, outputs, Run())
    assert text in str(caught.value)


def test_inputs_the_model_cannot_compute_are_the_callers_error(tmp_path: Path) -> None:
    """An index outside the table: the operator is named, no path of the runtime is; the model goes on serving."""
    model = load(tmp_path, models.lookup())
    with pytest.raises(InputError) as caught:
        model.run({"row": np.array([7])}, [], Run())
    assert "Gather 'rows'" in str(caught.value) and "/" not in str(caught.value)
    assert model.run({"row": np.array([1])}, [], Run())[0].tolist() == [[2, 3]]


def test_memory_of_a_run_is_bounded(tmp_path: Path) -> None:
    """A few bytes that ask for gigabytes get a typed error before the memory is taken."""
    model = load(tmp_path, models.zeros())
    for size in (ARENA, 1 << 40):
        with pytest.raises(TooLarge):
            model.run({"shape": np.array([size])}, [], Run())
    assert model.run({"shape": np.array([10])}, [], Run())[0].shape == (10,)


def test_answers_are_bounded(tmp_path: Path) -> None:
    """An answer above the bound is refused; one at the bound is given."""
    model = load(tmp_path, models.zeros(), output_bytes=4096)
    assert model.run({"shape": np.array([1024])}, [], Run())[0].nbytes == 4096
    with pytest.raises(TooLarge, match="4096"):
        model.run({"shape": np.array([1025])}, [], Run())


def test_a_run_can_be_ended_from_outside(tmp_path: Path) -> None:
    """A loop without end stops when it is cancelled, and the model serves the next caller."""
    model, run = load(tmp_path, models.endless()), Run()
    ended: list[BaseException] = []

    def count() -> None:
        try:
            model.run({"limit": np.array(1 << 62)}, [], run)
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=count)
    thread.start()
    run.cancel()
    thread.join(20)
    assert not thread.is_alive() and isinstance(ended[0], Cancelled)
    assert model.run({"limit": np.array(5)}, [], Run())[0] == 5


def test_constants_made_while_loading_are_bounded(tmp_path: Path) -> None:
    """A file of a hundred bytes cannot ask for gigabytes by being loaded."""
    from onnx import helper

    nodes = [helper.make_node("ConstantOfShape", ["n"], ["c"]), helper.make_node("Add", ["c", "x"], ["y"])]
    made = models.model(
        nodes, [("x", TensorProto.FLOAT, [1])], [("y", TensorProto.FLOAT, None)], {"n": np.array([1 << 36])}
    )
    model = load(tmp_path, made)
    with pytest.raises(TooLarge):
        model.run({"x": np.ones(1, np.float32)}, [], Run())


def test_external_weights_are_used(tmp_path: Path) -> None:
    """A model with its weights in a second file computes the same."""
    path = models.write_external(tmp_path / "m.onnx", models.product(), "m.weights")
    model = OnnxModel.load(path, Limits(arena_bytes=ARENA))
    assert model.run({"x": np.array([[1, 1, 1]], np.float32)}, [], Run())[0].tolist() == [[9, 12]]


def test_what_the_runtime_refuses_is_a_typed_error(tmp_path: Path) -> None:
    """An unknown operator, a type that is no tensor we serve, bytes that are no model."""
    from onnx import helper

    node = helper.make_node("NoSuchOperator", ["x"], ["y"])
    unknown = models.model([node], [("x", TensorProto.FLOAT, [1])], [("y", TensorProto.FLOAT, [1])])
    with pytest.raises(CheckpointError, match="cannot load it"):
        load(tmp_path, unknown)
    with pytest.raises(CheckpointError, match="float8e4m3fn"):
        load(tmp_path, models.identity(TensorProto.FLOAT8E4M3FN))
    (tmp_path / "junk.onnx").write_bytes(b"\x0a\x03abc")
    with pytest.raises(CheckpointError, match="cannot load it"):
        OnnxModel.load(tmp_path / "junk.onnx", Limits(arena_bytes=ARENA))
