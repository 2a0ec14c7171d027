"""Tensors of the Open Inference Protocol: every type both ways, and nothing that does not add up gets through."""

from __future__ import annotations

import math
import struct
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from autoglm.third_party import oip_pb2 as pb
from hypothesis import given
from hypothesis import strategies as st

from services.chassis.errors import InvalidRequest
from services.sparse_inference import oip_tensors
from services.sparse_inference.oip_settings import OipSettings

SETTINGS = OipSettings(oip_max_tensors=4, oip_max_parameters=2)

TYPES = [
    ("BOOL", np.bool_, [True, False]), ("INT8", np.int8, [-128, 127]), ("INT16", np.int16, [-32768, 1]),
    ("INT32", np.int32, [-(1 << 31), 7]), ("INT64", np.int64, [-(1 << 63), 7]), ("UINT8", np.uint8, [255, 0]),
    ("UINT16", np.uint16, [65535, 0]), ("UINT32", np.uint32, [(1 << 32) - 1, 0]),
    ("UINT64", np.uint64, [(1 << 64) - 1, 0]), ("FP16", np.float16, [1.5, -2]), ("FP32", np.float32, [1.5, -2]),
    ("FP64", np.float64, [math.pi, -2]), ("BF16", ml_dtypes.bfloat16, [1.5, -2]), ("BYTES", object, [b"\0\xff", b""]),
]  # fmt: skip


def request(datatype: str, shape: list[int], raw: bytes | None = None, **contents: Any) -> pb.ModelInferRequest:
    made = pb.ModelInferRequest(model_name="m")
    tensor = made.inputs.add(name="x", datatype=datatype, shape=shape)
    if raw is not None:
        made.raw_input_contents.append(raw)
    for name, values in contents.items():
        getattr(tensor.contents, name).extend(values)
    return made


def refused(made: pb.ModelInferRequest) -> str:
    with pytest.raises(InvalidRequest) as caught:
        oip_tensors.check(made, SETTINGS)
        oip_tensors.arrays(made)
    return caught.value.message


@pytest.mark.parametrize(("datatype", "kind", "values"), TYPES, ids=lambda value: str(value)[:12])
def test_every_type_comes_and_goes_raw(datatype: str, kind: Any, values: list[Any]) -> None:
    """What an answer writes, a request reads, bit for bit."""
    array = np.array([values], kind)
    answer = oip_tensors.answer(pb.ModelInferRequest(model_name="m", id="7"), "1", [("x", array)])
    assert (answer.id, answer.outputs[0].datatype, list(answer.outputs[0].shape)) == ("7", datatype, [1, 2])
    read = oip_tensors.arrays(request(datatype, [1, 2], answer.raw_output_contents[0]))["x"]
    assert read.dtype == array.dtype and read.shape == (1, 2) and (read == array).all()


@pytest.mark.parametrize(("datatype", "kind", "values"), TYPES, ids=lambda value: str(value)[:12])
def test_every_type_that_has_a_list_comes_in_it(datatype: str, kind: Any, values: list[Any]) -> None:
    """Typed contents mean the same; FP16 and BF16 have no list, and another type's list is refused."""
    field = oip_tensors.CONTENTS.get(datatype)
    if field is None:
        assert "raw_input_contents" in refused(request(datatype, [2]))
        return
    read = oip_tensors.arrays(request(datatype, [2, 1], **{field: values}))["x"]
    assert read.dtype == np.dtype(kind) and read.reshape(-1).tolist() == values
    other = "fp64_contents" if field != "fp64_contents" else "fp32_contents"
    assert field in refused(request(datatype, [1], **{other: [1]}))


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (request("FP32", [2, 3], b"\0" * 20), "takes 24 bytes, 20 came"),
        (request("FP32", [2, -3], b"\0" * 24), "a dimension of -3"),
        (request("FP32", [1 << 62, 4], b"\0" * 4), "beyond what an array can have"),
        (request("FP32", [1 << 32, 1 << 32], b""), "beyond what an array can have"),
        (request("FP32", [0, 1 << 62], b""), "beyond what an array can have"),
        (request("FP32", [1] * 33, b"\0" * 4), "33 dimensions"),
        (request("FP8", [1], b"\0"), "is no datatype"),
        (request("BYTES", [2], struct.pack("<I", 1) + b"a"), "has 2 elements"),
        (request("BYTES", [1], struct.pack("<I", 9) + b"a"), "element 0 says 9 bytes"),
        (request("BYTES", [1], struct.pack("<I", 1) + b"ab"), "has 1 elements"),
        (request("BYTES", [1], b"\0\0"), "has 1 elements"),
        (request("BYTES", [1], struct.pack("<I", 0xFFFFFFFF)), "says 4294967295 bytes"),
        (request("INT8", [1], int_contents=[128]), "outside the range of INT8"),
        (request("UINT16", [1], uint_contents=[65536]), "outside the range of UINT16"),
        (request("INT64", [2], int64_contents=[1]), "has 2 elements, 1 came"),
        (request("INT64", [1], b"\0" * 8, int64_contents=[1]), "contents beside raw_input_contents"),
        (request("INT64", [1]), "has 1 elements, 0 came"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_add_up_is_refused(made: pb.ModelInferRequest, text: str) -> None:
    """Shape, type, count and bytes must agree; the message says what was seen and what is allowed."""
    assert text in refused(made)


def test_the_request_as_a_whole_is_bounded() -> None:
    """Tensors, parameters, names, repeated names, shared memory, raw contents for some of the inputs only."""
    many = pb.ModelInferRequest(inputs=[pb.ModelInferRequest.InferInputTensor(name=f"{n}") for n in range(5)])
    assert "5 inputs, at most 4" in refused(many)
    twice = pb.ModelInferRequest(inputs=[pb.ModelInferRequest.InferInputTensor(name="x") for _ in range(2)])
    assert "'x' is there twice" in refused(twice)
    assert "at most 256" in refused(pb.ModelInferRequest(model_name="é" * 129))
    full = pb.ModelInferRequest(parameters={f"{n}": pb.InferParameter(bool_param=True) for n in range(3)})
    assert "3 parameters, at most 2" in refused(full)
    shared = request("FP32", [1], b"\0" * 4)
    shared.inputs[0].parameters["shared_memory_region"].string_param = "r"
    assert "shared memory" in refused(shared)
    odd = request("FP32", [1], b"\0" * 4)
    odd.inputs[0].parameters["classification"].int64_param = 3
    assert "'classification' is not known" in refused(odd)
    half = request("FP32", [1], b"\0" * 4)
    half.inputs.add(name="y", datatype="FP32", shape=[1])
    assert "1 raw_input_contents for 2 inputs" in refused(half)


def test_a_raw_truth_value_is_made_one() -> None:
    """A byte of 2 is true, and never reaches a kernel as 2."""
    read = oip_tensors.arrays(request("BOOL", [3], b"\x02\x00\xff"))["x"]
    assert read.view(np.uint8).tolist() == [1, 0, 1]


@given(
    st.sampled_from([*oip_tensors.DTYPES, "X"]),
    st.lists(st.integers(-(1 << 63), (1 << 63) - 1) | st.integers(0, 3), max_size=4),
    st.binary(max_size=64),
)
def test_any_declaration_is_read_or_refused(datatype: str, shape: list[int], raw: bytes) -> None:
    """Whatever is declared, the outcome is an array of that shape or an InvalidRequest."""
    made = request(datatype, shape, raw)
    try:
        oip_tensors.check(made, SETTINGS)
        assert list(oip_tensors.arrays(made)["x"].shape) == shape
    except InvalidRequest:
        pass
