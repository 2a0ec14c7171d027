"""Open Inference Protocol tensors to numpy arrays and back, each checked: type, shape, count and bytes must agree.

Used by the text face and the ONNX face of the protocol. Everything that does not fit is an InvalidRequest that names
the tensor, what was seen and what is allowed. An array may share memory with the message it came from.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt
from autoglm.third_party import oip_pb2 as pb

from services.chassis.errors import InvalidRequest
from services.sparse_inference.oip_settings import OipSettings

Array: TypeAlias = "npt.NDArray[Any]"

MAX_DIMENSIONS = 32
MAX_ELEMENTS = 1 << 40
"""Product of the dimensions that are not 0. Bytes must agree too; this keeps empty arrays from odd shapes."""
MAX_NAME_BYTES = 256
LENGTH_BYTES = 4
BYTES = "BYTES"
STRING = np.dtype(object)
DTYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    BYTES: STRING,
}
DATATYPES: Mapping[np.dtype[Any], str] = {dtype: name for name, dtype in DTYPES.items()}
CONTENTS: Mapping[str, str] = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    BYTES: "bytes_contents",
}
_SHARED_MEMORY = "shared_memory_region"


def check(request: pb.ModelInferRequest, settings: OipSettings) -> None:
    """The bounds of a request as a whole, before anything of it is used."""
    for what, text in (("model_name", request.model_name), ("id", request.id), ("version", request.model_version)):
        _check_name(what, text)
    for what, count in (("inputs", len(request.inputs)), ("outputs", len(request.outputs))):
        if count > settings.oip_max_tensors:
            raise InvalidRequest(f"{count} {what}, at most {settings.oip_max_tensors} are allowed", field=what)
    _check_parameters("the request", request.parameters, settings)
    for kind, tensors in (("input", request.inputs), ("output", request.outputs)):
        seen: set[str] = set()
        for tensor in tensors:
            _check_name(f"name of an {kind}", tensor.name)
            if tensor.name in seen:
                raise InvalidRequest(f"{kind} {tensor.name!r} is there twice", field=tensor.name)
            seen.add(tensor.name)
            _check_parameters(f"{kind} {tensor.name!r}", tensor.parameters, settings)
            if _SHARED_MEMORY in tensor.parameters:
                raise InvalidRequest(f"{kind} {tensor.name!r}: shared memory is not served; send the bytes")
            if unknown := sorted(tensor.parameters):
                raise InvalidRequest(f"{kind} {tensor.name!r}: the parameter {unknown[0]!r} is not known here")
    raw = len(request.raw_input_contents)
    if raw and raw != len(request.inputs):
        raise InvalidRequest(f"{raw} raw_input_contents for {len(request.inputs)} inputs; one for each is needed")


def arrays(request: pb.ModelInferRequest) -> dict[str, Array]:
    """Every input of a checked request. Elements of BYTES tensors are `bytes`."""
    raw = request.raw_input_contents
    found = {}
    for index, tensor in enumerate(request.inputs):
        dtype, count = _declared(tensor)
        has_contents = tensor.HasField("contents") and any(True for _ in tensor.contents.ListFields())
        if raw:
            if has_contents:
                raise InvalidRequest(f"input {tensor.name!r} has contents beside raw_input_contents; one is enough")
            flat = _raw(tensor, dtype, count, raw[index])
        else:
            flat = _typed(tensor, dtype, count)
        found[tensor.name] = flat.reshape(tuple(tensor.shape))
    return found


def answer(request: pb.ModelInferRequest, version: str, outputs: Iterable[tuple[str, Array]]) -> pb.ModelInferResponse:
    """A response with the outputs as raw bytes."""
    response = pb.ModelInferResponse(model_name=request.model_name, model_version=version, id=request.id)
    for name, array in outputs:
        response.outputs.add(name=name, datatype=DATATYPES[array.dtype], shape=array.shape)
        response.raw_output_contents.append(_bytes_of(array))
    return response


def strings(texts: Sequence[str]) -> Array:
    """A BYTES tensor of one dimension."""
    return np.array([text.encode() for text in texts], dtype=STRING)


def decoded(name: str, array: Array) -> Array:
    """A BYTES tensor with its elements as text. InvalidRequest when they are not UTF-8."""
    try:
        texts = [element.decode() for element in array.flat]
    except UnicodeDecodeError:
        raise InvalidRequest(f"input {name!r}: an element is not UTF-8 text", field=name) from None
    return _objects(texts).reshape(array.shape)


def parameter(value: pb.InferParameter) -> bool | int | float | str | None:
    """The value that was chosen; None when none was."""
    choice = value.WhichOneof("parameter_choice")
    chosen: bool | int | float | str | None = getattr(value, choice) if choice else None
    return chosen


def _check_name(what: str, text: str) -> None:
    if (size := len(text.encode())) > MAX_NAME_BYTES:
        raise InvalidRequest(f"{what}: {size} bytes, at most {MAX_NAME_BYTES} are allowed", field=what)


def _check_parameters(what: str, parameters: Mapping[str, pb.InferParameter], settings: OipSettings) -> None:
    if len(parameters) > settings.oip_max_parameters:
        limit = settings.oip_max_parameters
        raise InvalidRequest(f"{what} has {len(parameters)} parameters, at most {limit} are allowed")
    for name in parameters:
        _check_name(f"name of a parameter of {what}", name)


def _declared(tensor: pb.ModelInferRequest.InferInputTensor) -> tuple[np.dtype[Any], int]:
    """Type and number of elements. Python's integers cannot overflow, so no product of dimensions can deceive."""
    if tensor.datatype not in DTYPES:
        known = ", ".join(DTYPES)
        raise InvalidRequest(f"input {tensor.name!r}: {tensor.datatype[:32]!r} is no datatype; there are {known}")
    if len(tensor.shape) > MAX_DIMENSIONS:
        raise InvalidRequest(
            f"input {tensor.name!r}: {len(tensor.shape)} dimensions, at most {MAX_DIMENSIONS} are allowed"
        )
    for size in tensor.shape:
        if size < 0:
            raise InvalidRequest(f"input {tensor.name!r}: a dimension of {size} in {list(tensor.shape)}")
    if math.prod(size for size in tensor.shape if size) > MAX_ELEMENTS:
        raise InvalidRequest(f"input {tensor.name!r}: shape {list(tensor.shape)} is beyond what an array can have")
    return DTYPES[tensor.datatype], math.prod(tensor.shape)


def _raw(tensor: pb.ModelInferRequest.InferInputTensor, dtype: np.dtype[Any], count: int, data: bytes) -> Array:
    if dtype == STRING:
        return _texts(tensor, count, data)
    wanted = count * dtype.itemsize
    if len(data) != wanted:
        raise InvalidRequest(
            f"input {tensor.name!r}: {tensor.datatype} {list(tensor.shape)} takes {wanted} bytes, {len(data)} came",
            field=tensor.name, wanted_bytes=wanted, seen_bytes=len(data),
        )  # fmt: skip
    flat = np.frombuffer(data, np.uint8 if dtype == np.bool_ else dtype)
    return flat != 0 if dtype == np.bool_ else flat  # a byte of 2 is no bool that a kernel may be given


def _texts(tensor: pb.ModelInferRequest.InferInputTensor, count: int, data: bytes) -> Array:
    elements: list[bytes] = []
    at = 0
    while at < len(data) and len(elements) < count:
        if at + LENGTH_BYTES > len(data):
            break
        (size,) = struct.unpack_from("<I", data, at)
        at += LENGTH_BYTES
        if size > len(data) - at:
            raise InvalidRequest(f"input {tensor.name!r}: element {len(elements)} says {size} bytes, fewer came")
        elements.append(data[at : at + size])
        at += size
    if len(elements) != count or at != len(data):
        raise InvalidRequest(
            f"input {tensor.name!r}: shape {list(tensor.shape)} has {count} elements, the {len(data)} bytes do not"
        )
    return _objects(elements)


def _typed(tensor: pb.ModelInferRequest.InferInputTensor, dtype: np.dtype[Any], count: int) -> Array:
    wanted = CONTENTS.get(tensor.datatype)
    if wanted is None:
        raise InvalidRequest(f"input {tensor.name!r}: {tensor.datatype} has no contents list; use raw_input_contents")
    for field, _ in tensor.contents.ListFields():
        if field.name != wanted:
            raise InvalidRequest(f"input {tensor.name!r}: {tensor.datatype} comes in {wanted}, not in {field.name}")
    values = getattr(tensor.contents, wanted)
    if len(values) != count:
        raise InvalidRequest(
            f"input {tensor.name!r}: shape {list(tensor.shape)} has {count} elements, {len(values)} came",
            field=tensor.name, wanted=count, seen=len(values),
        )  # fmt: skip
    if dtype == STRING:
        return _objects(list(values))
    if dtype.kind in "iu" and dtype.itemsize < 4 and count:
        limits = np.iinfo(dtype)
        if min(values) < limits.min or max(values) > limits.max:
            raise InvalidRequest(f"input {tensor.name!r}: an element is outside the range of {tensor.datatype}")
    return np.array(values, dtype)


def _objects(elements: Sequence[object]) -> Array:
    flat = np.empty(len(elements), STRING)
    flat[:] = elements
    return flat


def _bytes_of(array: Array) -> bytes:
    if array.dtype != STRING:
        return np.ascontiguousarray(array).tobytes()
    elements = [element.encode() if isinstance(element, str) else bytes(element) for element in array.flat]
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)
