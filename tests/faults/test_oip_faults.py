"""Requests of the Open Inference Protocol, damaged on purpose: every one is served or refused, by a typed code."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from autoglm.third_party import oip_pb2 as pb

from services.sparse_inference import oip_tensors
from tests.fakes import onnx_models as models
from tests.fakes.processes import Service, running

SERVICE = "/inference.GRPCInferenceService/"
TYPED = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED"}
IDS = np.array([[1, 2, 50, 60]], np.int32)
NUMBERS = (0, -1, 1, 2, 3, 1 << 31, -(1 << 63), (1 << 63) - 1)


@pytest.fixture(scope="module", params=["language model", "onnx"])
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, bytes]]:
    """A worker, and a sound request for it."""
    made = pb.ModelInferRequest(model_name="m")
    if request.param == "onnx":
        path = models.write(tmp_path_factory.mktemp("model") / "m.onnx", models.lookup())
        tensors = {"row": np.array([1, 2])}
    else:
        path = Path("models/glm-tiny")
        tensors = {"input_ids": IDS, "stream": np.array([False])}
        made.parameters["max_tokens"].int64_param = 2
    written = oip_tensors.answer(made, "", tensors.items())
    for output in written.outputs:
        made.inputs.add(name=output.name, datatype=output.datatype, shape=output.shape)
    made.raw_input_contents.extend(written.raw_output_contents)
    with running(
        "services.sparse_inference", AUTOGLM_MODEL_DIR=str(path), AUTOGLM_MODEL_NAME="m",
        AUTOGLM_MESH_ADDRESS="127.0.0.1:1", AUTOGLM_MAX_RUNNING="2",
    ) as service:  # fmt: skip
        yield service, made.SerializeToString()


def damaged(sound: bytes, dice: random.Random) -> bytes:
    """The same request with one to three things wrong: bytes changed, a shape, a type, contents, parameters."""
    request = pb.ModelInferRequest.FromString(sound)
    for _ in range(dice.randint(1, 3)):
        tensor = dice.choice(request.inputs) if request.inputs else request.inputs.add()
        match dice.randrange(8):
            case 0:
                tensor.shape.append(dice.choice(NUMBERS))
            case 1:
                tensor.shape[:] = [dice.choice(NUMBERS) for _ in tensor.shape]
            case 2:
                tensor.datatype = dice.choice([*oip_tensors.DTYPES, "", "FP8"])
            case 3:
                tensor.name = dice.choice(["", "row", "input_ids", "stream", "text_input", "x" * 300])
            case 4:
                request.raw_input_contents.append(dice.randbytes(dice.randrange(40)))
            case 5:
                del request.raw_input_contents[:]
                tensor.contents.int_contents.extend(dice.choice([1, -1, 1 << 30]) for _ in range(dice.randrange(4)))
            case 6:
                name = dice.choice(["max_tokens", "temperature", "seed", "top_k", "timeout", "stop", "stream"])
                request.parameters[name].string_param = dice.choice(["", "1", "-1", "nan", "1e9", "9" * 70])
            case 7:
                request.outputs.add(name=dice.choice(["", "y", "output_ids", "text_output", "finish_reason"]))
    raw = bytearray(request.SerializeToString())
    if raw and dice.random() < 0.3:
        raw[dice.randrange(len(raw))] = dice.randrange(256)
    return bytes(raw)


def test_every_damaged_request_gets_a_typed_answer(target: tuple[Service, bytes]) -> None:
    """300 of them, blocking and on a stream: no INTERNAL, no UNKNOWN, and the sound one is served afterwards."""
    service, sound = target
    dice = random.Random(7)
    requests = [damaged(sound, dice) for _ in range(300)]
    with grpc.insecure_channel(service.address) as channel:
        infer = channel.unary_unary(SERVICE + "ModelInfer")
        stream = channel.stream_stream(SERVICE + "ModelStreamInfer")
        for raw in requests:
            assert code(infer, raw) in TYPED, raw
        for start in range(0, 300, 50):
            try:
                for answer in stream(iter(requests[start : start + 50]), timeout=30):
                    text = pb.ModelStreamInferResponse.FromString(answer).error_message
                    assert text.startswith("[") is bool(text) and "[INTERNAL]" not in text
            except grpc.RpcError as error:  # bytes that are no message end the stream
                assert error.code().name in TYPED
        assert code(infer, sound) == "OK"
    assert not any("exception" in line for line in service.lines)


def code(call: grpc.UnaryUnaryMultiCallable, raw: bytes) -> str:
    try:
        call(raw, timeout=20)
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"
