"""The Open Inference Protocol face of a worker as a process: language models, ONNX models, bounds, streams, drain."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from autoglm.sparse_inference.v1 import sparse_inference_pb2 as worker_pb
from autoglm.sparse_inference.v1 import sparse_inference_pb2_grpc as worker_rpc
from autoglm.third_party import oip_pb2 as pb
from autoglm.third_party import oip_pb2_grpc as rpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from onnx import TensorProto
from prometheus_client.parser import text_string_to_metric_families

from services.sparse_inference import oip_tensors
from tests.fakes import onnx_models as models
from tests.fakes.processes import Service, running

IDS = np.array([[1, 2, 50, 60, 70, 80]], np.int64)
NOWHERE = "127.0.0.1:1"

VLLM_NAMES = {
    "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc",
    "vllm:cache_config_info", "vllm:lora_requests_info", "vllm:prompt_tokens_total", "vllm:generation_tokens_total",
    "vllm:time_to_first_token_seconds_bucket", "vllm:time_per_output_token_seconds_bucket",
    "vllm:inter_token_latency_seconds_bucket", "vllm:e2e_request_latency_seconds_bucket",
    "vllm:request_prompt_tokens_bucket", "vllm:request_generation_tokens_bucket", "vllm:request_success_total",
    "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total", "vllm:num_preemptions_total",
    "vllm:spec_decode_num_drafts_total", "vllm:spec_decode_num_draft_tokens_total",
    "vllm:spec_decode_num_accepted_tokens_total",
}  # fmt: skip


@pytest.fixture(scope="module")
def worker() -> Iterator[Service]:
    with running("services.sparse_inference", AUTOGLM_MESH_ADDRESS=NOWHERE, AUTOGLM_OIP_STREAM_REQUESTS="2") as service:
        yield service


@pytest.fixture
async def stub(worker: Service) -> AsyncIterator[rpc.GRPCInferenceServiceStub]:
    async with grpc.aio.insecure_channel(worker.address) as channel:
        yield rpc.GRPCInferenceServiceStub(channel)


def ask(model: str, id: str = "", outputs: tuple[str, ...] = (), **tensors: np.ndarray) -> pb.ModelInferRequest:
    """A request with raw tensors; its answer's form is a request's."""
    written = oip_tensors.answer(pb.ModelInferRequest(), "", tensors.items())
    request = pb.ModelInferRequest(model_name=model, id=id, raw_input_contents=written.raw_output_contents)
    for output in written.outputs:
        request.inputs.add(name=output.name, datatype=output.datatype, shape=output.shape)
    for name in outputs:
        request.outputs.add(name=name)
    return request


def tokens(id: str = "", max_tokens: int = 5, stream: bool = True, **parameters: Any) -> pb.ModelInferRequest:
    request = ask("glm-tiny", id, input_ids=IDS, stream=np.array([stream]))
    for name, value in {"max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, **parameters}.items():
        kind = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}[type(value)]
        setattr(request.parameters[name], kind, value)
    return request


async def refusal(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call
    return caught.value.code(), caught.value.details() or ""


def read(answer: pb.ModelInferResponse) -> dict[str, np.ndarray]:
    request = pb.ModelInferRequest(raw_input_contents=answer.raw_output_contents)
    for output in answer.outputs:
        request.inputs.add(name=output.name, datatype=output.datatype, shape=output.shape)
    return oip_tensors.arrays(request)


async def test_health_and_reflection_know_the_protocol(worker: Service) -> None:
    """The service is named in health, so that balancers see it."""
    async with grpc.aio.insecure_channel(worker.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        answer = await health.Check(health_pb2.HealthCheckRequest(service="inference.GRPCInferenceService"))
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_a_stream_takes_any_number_of_requests(stub: rpc.GRPCInferenceServiceStub) -> None:
    """More than may be at work at once: all are served, each with one final answer, and the stream ends well."""
    requests = [tokens(f"r{n}", 1 + n) for n in range(7)]
    answers = [answer async for answer in stub.ModelStreamInfer(iter(requests))]
    assert not any(answer.error_message for answer in answers)
    for n in range(7):
        own = [answer.infer_response for answer in answers if answer.infer_response.id == f"r{n}"]
        assert sum(read(answer)["output_ids"].size for answer in own) == 1 + n
        assert [answer.parameters["triton_final_response"].bool_param for answer in own] == [False] * (len(own) - 1) + [
            True
        ]


async def test_ids_may_be_typed_contents_of_any_integer_type(stub: rpc.GRPCInferenceServiceStub) -> None:
    """INT64, INT32 and UINT32, raw or in a list, [n] or [1, n]: the same answer."""
    first = read(await stub.ModelInfer(tokens(stream=False)))["output_ids"]
    for datatype, field in (("INT32", "int_contents"), ("INT64", "int64_contents"), ("UINT32", "uint_contents")):
        request = tokens(stream=False)
        del request.raw_input_contents[:]
        request.inputs[0].datatype, request.inputs[0].shape[:] = datatype, [6]
        getattr(request.inputs[0].contents, field).extend(IDS[0].tolist())
        request.inputs[1].contents.bool_contents.append(False)
        assert (read(await stub.ModelInfer(request))["output_ids"] == first).all()


@pytest.mark.parametrize(
    ("request_", "code", "text"),
    [
        (ask("other", input_ids=IDS), "NOT_FOUND", "this worker serves 'glm-tiny'"),
        (ask("glm-tiny"), "INVALID_ARGUMENT", "one of the inputs text_input and input_ids"),
        (ask("glm-tiny", input_ids=IDS, what=IDS), "INVALID_ARGUMENT", "input 'what' is not known"),
        (ask("glm-tiny", outputs=("logits",), input_ids=IDS), "INVALID_ARGUMENT", "output 'logits' does not exist"),
        (ask("glm-tiny", input_ids=-IDS), "INVALID_ARGUMENT", "are no token ids"),
        (ask("glm-tiny", input_ids=IDS + 4096), "INVALID_ARGUMENT", "is no token of this model"),
        (ask("glm-tiny", input_ids=IDS.astype(np.float32)), "INVALID_ARGUMENT", "input_ids must be one of INT32"),
        (ask("glm-tiny", input_ids=IDS.reshape(2, 3)), "INVALID_ARGUMENT", "it takes [n] or [1, n]"),
        (ask("glm-tiny", input_ids=IDS[:, :0]), "INVALID_ARGUMENT", "token_ids: 0 elements"),
        (ask("glm-tiny", input_ids=np.zeros(131_073, np.int32)), "INVALID_ARGUMENT", "at most 131072 elements"),
        (tokens(stream=True), "INVALID_ARGUMENT", "use ModelStreamInfer"),
        (tokens(stream=False, max_tokens=4000), "INVALID_ARGUMENT", "exceed the context"),
        (tokens(stream=False, guided=True), "INVALID_ARGUMENT", "'guided' is not known"),
        (tokens(stream=False, sequence_id=3), "INVALID_ARGUMENT", "'sequence_id' is not served"),
        (tokens(stream=False, timeout=-1), "INVALID_ARGUMENT", "microseconds"),
        (tokens(stream=False, max_tokens=2000, timeout=50_000), "DEADLINE_EXCEEDED", "deadline"),
        (ask("glm-tiny", text_input=np.array([b"x"], object)), "UNAVAILABLE", "the tokenizer did not answer"),
        (ask("glm-tiny", text_input=np.array([b"\xff"], object)), "INVALID_ARGUMENT", "not UTF-8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_what_cannot_be_served_is_refused(
    stub: rpc.GRPCInferenceServiceStub, request_: pb.ModelInferRequest, code: str, text: str
) -> None:
    """The right code, and words that name the tensor, the limit and the value."""
    seen, details = await refusal(stub.ModelInfer(request_))
    assert (seen.name, text in details) == (code, True), details


async def test_a_refusal_on_a_stream_carries_its_reason(stub: rpc.GRPCInferenceServiceStub) -> None:
    """Text for people, id and reason for programs; with Triton's header the stream ends with the status instead."""
    wrong = [tokens("bad", temperature=1000.0), tokens("good")]
    answers = [answer async for answer in stub.ModelStreamInfer(iter(wrong))]
    (failed,) = [answer for answer in answers if answer.error_message]
    assert failed.infer_response.id == "bad" and "temperature" in failed.error_message
    assert failed.infer_response.parameters["autoglm_reason"].string_param == "INVALID_REQUEST"
    assert any(answer.infer_response.id == "good" for answer in answers)
    code, _ = await refusal(stub.ModelStreamInfer(iter(wrong), metadata=(("triton_grpc_error", "true"),)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT


async def test_leaving_a_stream_frees_the_slots(worker: Service, stub: rpc.GRPCInferenceServiceStub) -> None:
    """A client that cancels its stream leaves nothing running."""
    async with grpc.aio.insecure_channel(worker.address) as channel, asyncio.timeout(20):
        own = worker_rpc.SparseInferenceServiceStub(channel)
        before = await own.GetLoad(worker_pb.GetLoadRequest())
        call = stub.ModelStreamInfer(iter([tokens("a", 2000), tokens("b", 2000)]))
        async for _ in call:
            call.cancel()
            break
        while (load := await own.GetLoad(worker_pb.GetLoadRequest())).running:
            pass
    assert 0 < load.generated_tokens - before.generated_tokens < 2000, "nothing was computed to its end"


async def test_the_metrics_page_has_vllms_names(worker: Service, stub: rpc.GRPCInferenceServiceStub) -> None:
    """Every name that pickers and dashboards of vLLM servers look for, parsed as Prometheus does, with its values."""
    before = samples(worker)
    await stub.ModelInfer(tokens(stream=False, max_tokens=4))
    after = samples(worker)
    assert {name for name, _ in after} >= VLLM_NAMES

    def grown(name: str, **labels: str) -> float:
        key = (name, frozenset({"model_name": "glm-tiny", **labels}.items()))
        return after[key] - before[key]

    assert grown("vllm:prompt_tokens_total") == grown("vllm:prefix_cache_queries_total") == 6
    assert grown("vllm:generation_tokens_total") == 4
    assert grown("vllm:request_success_total", finished_reason="length") == 1
    assert grown("vllm:time_to_first_token_seconds_count") == 1
    assert grown("vllm:inter_token_latency_seconds_count") == grown("vllm:time_per_output_token_seconds_count") <= 3
    (info,) = [dict(labels) for name, labels in after if name == "vllm:cache_config_info"]
    assert info["block_size"] == "16" and int(info["num_gpu_blocks"]) > 0


def samples(service: Service) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(service.metrics())
        for sample in family.samples
    }


async def test_a_drain_ends_idle_streams() -> None:
    """SIGTERM: a stream with nothing at work is told to go elsewhere, and the process ends with status 0."""
    with running("services.sparse_inference", AUTOGLM_MESH_ADDRESS=NOWHERE) as service:
        async with grpc.aio.insecure_channel(service.address) as channel:
            call = rpc.GRPCInferenceServiceStub(channel).ModelStreamInfer()
            await call.write(tokens("a"))
            answer = await call.read()
            while not answer.infer_response.parameters["triton_final_response"].bool_param:
                answer = await call.read()
            service.signal(signal.SIGTERM)
            code, text = await refusal(call.read())
            assert code is grpc.StatusCode.UNAVAILABLE and "draining" in text
        assert await asyncio.to_thread(service.wait) == 0


@pytest.fixture(scope="module")
def onnx_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Serves an endless counter: a model that can be kept busy."""
    path = models.write(tmp_path_factory.mktemp("model") / "model.onnx", models.endless())
    with running(
        "services.sparse_inference", AUTOGLM_MODEL_DIR=str(path.parent), AUTOGLM_MODEL_NAME="counter",
        AUTOGLM_MESH_ADDRESS=NOWHERE, AUTOGLM_ONNX_RUNS="1", AUTOGLM_ONNX_WAITING="1",
    ) as service:  # fmt: skip
        yield service


def count(limit: int) -> pb.ModelInferRequest:
    return ask("counter", limit=np.array(limit))


async def test_an_onnx_worker_makes_no_tokens_and_says_so(onnx_worker: Service) -> None:
    """Generate and Score name what the model is; GetModelInfo describes it."""
    async with grpc.aio.insecure_channel(onnx_worker.address) as channel:
        own = worker_rpc.SparseInferenceServiceStub(channel)
        asked = worker_pb.GenerateRequest(request_id="r", tenant="t", token_ids=[1])
        code, text = await refusal(own.Generate(asked))
        assert code is grpc.StatusCode.FAILED_PRECONDITION and "counter is an ONNX model and makes no tokens" in text
        info = await own.GetModelInfo(worker_pb.GetModelInfoRequest())
        assert (info.architecture, info.executor) == ("onnx", "onnxruntime")
        assert info.variant_digest.startswith("sha256:") and info.weight_bytes > 0


async def test_a_deadline_ends_an_endless_run(onnx_worker: Service) -> None:
    """The caller's deadline stops the model itself: the one thread serves the next caller."""
    async with grpc.aio.insecure_channel(onnx_worker.address) as channel:
        stub = rpc.GRPCInferenceServiceStub(channel)
        code, _ = await refusal(stub.ModelInfer(count(1 << 62), timeout=0.3))
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert read(await stub.ModelInfer(count(5)))["count"] == 5


async def test_more_than_the_queue_holds_is_refused(onnx_worker: Service) -> None:
    """One run, one place to wait: the third is told to come back; when the run is left, the waiting one is served."""
    async with grpc.aio.insecure_channel(onnx_worker.address) as channel, asyncio.timeout(40):
        stub, own = rpc.GRPCInferenceServiceStub(channel), worker_rpc.SparseInferenceServiceStub(channel)
        busy = stub.ModelInfer(count(1 << 62))
        while not (await own.GetLoad(worker_pb.GetLoadRequest())).running:
            pass
        waiting = stub.ModelInfer(count(3))
        while not (await own.GetLoad(worker_pb.GetLoadRequest())).waiting:
            pass
        code, text = await refusal(stub.ModelInfer(count(4)))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED and "onnx" in text
        busy.cancel()
        assert read(await waiting)["count"] == 3


async def test_onnx_metrics_tell_how_busy_it_is(onnx_worker: Service) -> None:
    """The names by which pickers balance, and a count of answers."""
    names = {name for name, _ in samples(onnx_worker)}
    assert names >= {"vllm:num_requests_running", "vllm:num_requests_waiting", "autoglm_inferences_total"}


async def test_strings_and_large_answers(tmp_path: Path) -> None:
    """BYTES in and out as UTF-8; an answer larger than a message is refused, not broken off."""
    models.write(tmp_path / "text.onnx", models.identity(TensorProto.STRING))
    models.write(tmp_path / "zeros.onnx", models.zeros())
    common = {"AUTOGLM_MODEL_NAME": "m", "AUTOGLM_MESH_ADDRESS": NOWHERE, "AUTOGLM_MAX_MESSAGE_BYTES": "1000000"}
    with running("services.sparse_inference", AUTOGLM_MODEL_DIR=str(tmp_path / "text.onnx"), **common) as service:
        async with grpc.aio.insecure_channel(service.address) as channel:
            stub = rpc.GRPCInferenceServiceStub(channel)
            texts = np.array([["ü".encode(), b""]], object)
            assert read(await stub.ModelInfer(ask("m", x=texts)))["y"].tolist() == texts.tolist()
            code, text = await refusal(stub.ModelInfer(ask("m", x=np.array([[b"\xff"]], object))))
            assert code is grpc.StatusCode.INVALID_ARGUMENT and "'x'" in text
    with running("services.sparse_inference", AUTOGLM_MODEL_DIR=str(tmp_path / "zeros.onnx"), **common) as service:
        async with grpc.aio.insecure_channel(service.address) as channel:
            stub = rpc.GRPCInferenceServiceStub(channel)
            assert read(await stub.ModelInfer(ask("m", shape=np.array([200_000]))))["zeros"].shape == (200_000,)
            code, _ = await refusal(stub.ModelInfer(ask("m", shape=np.array([250_000]))))
            assert code is grpc.StatusCode.INVALID_ARGUMENT


def test_a_model_that_cannot_be_loaded_is_one_clear_line(tmp_path: Path) -> None:
    """Status 2 and the setting's name, whatever is wrong with the file."""
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    with running("services.sparse_inference", ready=None, AUTOGLM_MODEL_DIR=str(tmp_path)) as service:
        assert service.wait() == 2
        assert any("AUTOGLM_MODEL_DIR: " in str(line.get("text")) for line in service.lines)
