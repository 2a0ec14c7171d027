"""NVIDIA's own client works unchanged against the worker: text, ids, tensors, streams, asyncio, errors.

The client lives in a virtual environment of its own (it wants an older protobuf) and runs as a process.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from autoglm.sparse_inference.v1 import sparse_inference_pb2 as pb
from autoglm.sparse_inference.v1 import sparse_inference_pb2_grpc as rpc
from autoglm.type.v1 import generation_pb2
from onnx.reference import ReferenceEvaluator

from tests.fakes import onnx_models as models
from tests.fakes.processes import REPOSITORY, Service, running
from tests.fakes.venvs import TRITON, python_with, run_script

SCRIPT = Path(__file__).parent / "triton_client" / "real_client.py"
IDS = [1, 2, 50, 60, 70, 80]

pytestmark = pytest.mark.timeout(300)  # the first run builds the client's environment


@pytest.fixture(scope="module")
def triton() -> Path:
    return python_with("triton", TRITON)


@pytest.fixture(scope="module")
def worker() -> Iterator[Service]:
    with running("services.tokenizer") as tokenizer:  # stands where Envoy would: every call of the worker goes there
        with running("services.sparse_inference", AUTOGLM_MESH_ADDRESS=tokenizer.address) as service:
            yield service


@pytest.fixture(scope="module")
def said(triton: Path, worker: Service) -> dict[str, Any]:
    """What the client saw of a language model."""
    answer: dict[str, Any] = json.loads(run_script(triton, SCRIPT, "text", worker.address))
    return answer


@pytest.fixture(scope="module")
def expected(worker: Service) -> list[int]:
    """The ids the worker's own API gives for the same prompt."""
    with grpc.insecure_channel(worker.address) as channel:
        request = pb.GenerateRequest(request_id="r", tenant="t", token_ids=IDS, max_tokens=7, ignore_eos=True)
        request.sampling.CopyFrom(generation_pb2.SamplingParams(temperature=0))
        return [i for m in rpc.SparseInferenceServiceStub(channel).Generate(request) for i in m.chunk.token_ids]


def test_the_server_and_the_model_introduce_themselves(said: dict[str, Any]) -> None:
    """Liveness, readiness, and metadata with the tensors that users of vLLM on Triton send."""
    assert said["live"] and said["ready"] == [True, True, False]
    assert said["server"]["name"] == "autoglm" and "model_stream_infer" in said["server"]["extensions"]
    inputs = {tensor["name"]: tensor["datatype"] for tensor in said["model"]["inputs"]}
    assert inputs.items() >= {"text_input": "BYTES", "stream": "BOOL", "input_ids": "INT64"}.items()
    assert {"text_output", "output_ids"} <= {tensor["name"] for tensor in said["model"]["outputs"]}


def test_ids_are_those_of_the_workers_own_api(said: dict[str, Any], expected: list[int]) -> None:
    """One answer, by tensor or by parameters, and the asyncio stream: the same six tokens."""
    assert said["blocking"] == said["by_parameters"] == [expected[:6]]
    assert said["asyncio"] == expected[:6]
    assert said["counted"] == {"finish_reason": "length", "num_input_tokens": 6, "num_output_tokens": 6}


def test_text_comes_with_or_without_the_prompt(said: dict[str, Any]) -> None:
    """Without `stream` the prompt comes first unless it is excluded, as vLLM's backend has it."""
    text = said["text"]
    assert text["whole"] == [text["prompt"] + text["bare"][0]] and text["bare"][0]
    assert said["one_answer"]["r0"] == [text["whole"]]


def test_streamed_text_is_the_whole_text(said: dict[str, Any]) -> None:
    """The parts of a stream, joined, are the one answer; there are several, and the last is marked."""
    parts = said["streamed_text"]["r0"]
    assert "".join(text for part in parts for text in part) == said["text"]["bare"][0]
    assert len(parts) > 1


def test_requests_share_a_stream_and_keep_their_ids(said: dict[str, Any], expected: list[int]) -> None:
    """Five requests at once on one stream: each gets its own tokens, in order."""
    got = {name: [token for part in parts for token in part] for name, parts in said["many"].items()}
    assert got == {f"r{n}": expected[: 3 + n] for n in range(5)}


def test_an_error_ends_its_request_not_the_stream(said: dict[str, Any], expected: list[int]) -> None:
    """The refused request is told why; the next one on the stream is served."""
    seen = said["error_on_stream"]
    assert len(seen["errors"]) == 1 and "temperature: 1000 is more than 100" in seen["errors"][0]
    assert seen["r1"] == [expected[:6]]


def test_errors_have_their_codes(said: dict[str, Any]) -> None:
    """An unknown model is NOT_FOUND and names what is here; the client's timeout is a deadline."""
    assert said["unknown_model"][0] == "StatusCode.NOT_FOUND" and "glm-tiny" in said["unknown_model"][1]
    assert said["client_timeout"][0] == "StatusCode.DEADLINE_EXCEEDED"


def test_the_documented_example_works(triton: Path, worker: Service, tmp_path: Path) -> None:
    """The example of docs/open-inference-protocol.md, run as it stands but for the port, prints Python code."""
    text = (REPOSITORY / "docs" / "open-inference-protocol.md").read_text()
    example = text.split("```python\n")[1].split("```")[0]
    assert "127.0.0.1:50060" in example
    script = tmp_path / "example.py"
    script.write_text(example.replace("127.0.0.1:50060", worker.address))
    assert len(run_script(triton, script).split()) > 3


def test_a_convolution_net_is_served(triton: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """ModelInfer over ONNX: metadata, results, chosen outputs, ordered streams, typed errors, honest gaps."""
    made = models.convolution()
    path = models.write(tmp_path_factory.mktemp("model") / "net.onnx", made)
    with running(
        "services.sparse_inference", AUTOGLM_MODEL_DIR=str(path), AUTOGLM_MODEL_NAME="net",
        AUTOGLM_MESH_ADDRESS="127.0.0.1:1",
    ) as service:  # fmt: skip
        seen = json.loads(run_script(triton, SCRIPT, "tensors", service.address))
    image = np.arange(32, dtype=np.float32).reshape(2, 1, 4, 4)
    features, mean = ReferenceEvaluator(made).run(None, {"image": image})
    assert seen["ready"] and seen["id"] == "7" and seen["model"]["platform"] == "onnxruntime_onnx"
    assert seen["model"]["inputs"] == [{"name": "image", "datatype": "FP32", "shape": ["-1", "1", "-1", "-1"]}]
    np.testing.assert_allclose(seen["features"], features, rtol=1e-5)
    np.testing.assert_allclose(seen["mean"], mean.reshape(-1), rtol=1e-5)
    np.testing.assert_allclose(seen["async_infer"], mean.reshape(-1), rtol=1e-5)
    assert seen["names"] == ["mean"] and seen["stream_order"] == ["0", "1", "2", "3"]
    np.testing.assert_allclose(seen["stream_scales"], [features.max() * n for n in range(4)], rtol=1e-5)
    assert seen["wrong_shape"][0] == "StatusCode.INVALID_ARGUMENT"
    assert "'image' has shape [1, 4, 4], the model takes [-1, 1, -1, -1]" in seen["wrong_shape"][1]
    assert seen["wrong_output"][0] == "StatusCode.INVALID_ARGUMENT"
    assert seen["not_here"][0] == "StatusCode.UNIMPLEMENTED"
