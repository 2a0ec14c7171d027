"""The inference worker as a process: streams, fences, bounds, cancellation, scoring, drain."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator

import grpc
import pytest
from autoglm.sparse_inference.v1 import sparse_inference_pb2 as pb
from autoglm.sparse_inference.v1 import sparse_inference_pb2_grpc as rpc
from autoglm.type.v1 import generation_pb2

from tests.fakes.processes import Service, running

PROMPT = [1, 2, 50, 60, 70, 80, 90, 100, 110, 120, 130, 140, 150, 160, 170, 180, 190, 200, 210, 220]
LONG = 2000


@pytest.fixture(scope="module")
def worker() -> Iterator[Service]:
    # No cache and no scheduler behind this address: the worker must serve without either.
    with running(
        "services.sparse_inference", AUTOGLM_MESH_ADDRESS="127.0.0.1:1", AUTOGLM_INSTANCE="worker-under-test",
        AUTOGLM_MAX_RUNNING="4", AUTOGLM_MAX_WAITING="2",
    ) as service:  # fmt: skip
        yield service


@pytest.fixture
async def stub(worker: Service) -> AsyncIterator[rpc.SparseInferenceServiceStub]:
    async with grpc.aio.insecure_channel(worker.address) as channel:
        yield rpc.SparseInferenceServiceStub(channel)


def ask(token_ids: list[int] = PROMPT, **fields: object) -> pb.GenerateRequest:
    values: dict[str, object] = {"request_id": "r", "tenant": "t", "max_tokens": 8, "ignore_eos": True} | fields
    sampling = values.pop("sampling", generation_pb2.SamplingParams(temperature=0))
    return pb.GenerateRequest(token_ids=token_ids, sampling=sampling, **values)  # type: ignore[arg-type]


async def collect(call: object) -> tuple[list[int], pb.Finish, list[pb.PositionLogprobs]]:
    ids: list[int] = []
    scores: list[pb.PositionLogprobs] = []
    finish = None
    async for message in call:  # type: ignore[attr-defined]
        assert finish is None, "nothing comes after the finish"
        assert message.variant_digest.startswith("sha256:")
        if message.WhichOneof("event") == "chunk":
            assert message.chunk.first_position == len(ids)
            ids += message.chunk.token_ids
            scores += message.chunk.logprobs
        else:
            finish = message.finish
    assert finish is not None, "a stream ends with a finish"
    return ids, finish, scores


async def idle(stub: rpc.SparseInferenceServiceStub) -> pb.GetLoadResponse:
    """The load when nothing runs any more; each look is a round trip to the worker."""
    async with asyncio.timeout(20):
        while (load := await stub.GetLoad(pb.GetLoadRequest())).running:
            pass
    return load


async def was_left(stub: rpc.SparseInferenceServiceStub, before: pb.GetLoadResponse) -> None:
    """Nothing runs any more, and a request of LONG tokens did not get there by being computed to its end."""
    load = await idle(stub)
    assert load.generated_tokens - before.generated_tokens < LONG


async def refusal(call: object) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call  # type: ignore[misc]
    return caught.value.code(), caught.value.details() or ""


async def test_a_generation_streams_and_finishes(stub: rpc.SparseInferenceServiceStub) -> None:
    """Greedy tokens with their log-probabilities, a finish with the counts, the digest in every message."""
    ids, finish, scores = await collect(stub.Generate(ask(logprobs=True, top_logprobs=3)))
    assert len(ids) == 8 and finish.reason == generation_pb2.FINISH_REASON_LENGTH
    assert finish.usage.prompt_tokens == 20 and finish.usage.completion_tokens == 8
    assert [entry.chosen.token_id for entry in scores] == ids
    assert all(entry.top[0].token_id == entry.chosen.token_id and len(entry.top) == 3 for entry in scores)


async def test_tokens_that_come_quickly_share_a_message() -> None:
    """Only the first token and the end never wait: quick steps cost the way to the caller fewer messages."""
    with running(
        "services.sparse_inference", AUTOGLM_MESH_ADDRESS="127.0.0.1:1", AUTOGLM_STREAM_INTERVAL_MS="1000"
    ) as service:
        async with grpc.aio.insecure_channel(service.address) as channel:
            call = rpc.SparseInferenceServiceStub(channel).Generate(ask(max_tokens=100))
            sizes = [len(message.chunk.token_ids) async for message in call if message.HasField("chunk")]
    assert sum(sizes) == 100 and len(sizes) <= 50 and sizes[0] < max(sizes)


async def test_headers_come_when_a_request_has_its_place(stub: rpc.SparseInferenceServiceStub) -> None:
    """Whoever stands in between hears of a request that waits before there is a token to hold up."""
    running_now = [stub.Generate(ask(max_tokens=1900, tenant=f"t{number}")) for number in range(4)]
    for call in running_now:
        await anext(aiter(call))
    waiting = stub.Generate(ask(tenant="t4"))
    await waiting.initial_metadata()
    assert (await stub.GetLoad(pb.GetLoadRequest())).waiting == 1
    for call in (*running_now, waiting):
        call.cancel()
    await idle(stub)


async def test_company_changes_nothing(stub: rpc.SparseInferenceServiceStub) -> None:
    """Seeded streams computed together equal the same streams computed alone."""

    def request(seed: int) -> pb.GenerateRequest:
        hot = generation_pb2.SamplingParams(temperature=1.2, seed=seed)
        return ask(PROMPT[: 10 + seed], sampling=hot, max_tokens=12, tenant=f"t{seed}")

    together = await asyncio.gather(*(collect(stub.Generate(request(seed))) for seed in range(4)))
    for seed in range(4):
        alone, _, _ = await collect(stub.Generate(request(seed)))
        assert alone == together[seed][0]


async def test_a_second_request_reuses_the_prefix(stub: rpc.SparseInferenceServiceStub) -> None:
    """The same prompt again skips its whole blocks; the tokens are the same; another tenant gets no hit."""
    first, cold, _ = await collect(stub.Generate(ask(tenant="reuse")))
    second, warm, _ = await collect(stub.Generate(ask(tenant="reuse")))
    _, stranger, _ = await collect(stub.Generate(ask(tenant="stranger")))
    assert (cold.usage.cached_tokens, warm.usage.cached_tokens, stranger.usage.cached_tokens) == (0, 16, 0)
    assert first == second


async def test_scores_agree_with_generation(stub: rpc.SparseInferenceServiceStub) -> None:
    """Teacher-forced log-probabilities of generated tokens equal those reported while generating, to the bit."""
    ids, _, scores = await collect(stub.Generate(ask(logprobs=True)))
    answer = await stub.Score(pb.ScoreRequest(request_id="s", token_ids=[*PROMPT, *ids], start=len(PROMPT)))
    assert [entry.chosen for entry in answer.positions] == [entry.chosen for entry in scores]


async def test_resuming_gives_the_rest(stub: rpc.SparseInferenceServiceStub) -> None:
    """A stream cut after three tokens and resumed from its ids is the undisturbed stream."""
    hot = generation_pb2.SamplingParams(temperature=1.0, seed=42, frequency_penalty=0.5)
    whole, _, _ = await collect(stub.Generate(ask(sampling=hot, max_tokens=10)))
    resumed = ask([*PROMPT, *whole[:3]], sampling=hot, max_tokens=7, resumed_tokens=3)
    rest = [m async for m in stub.Generate(resumed)]
    ids = [token for m in rest for token in m.chunk.token_ids]
    assert rest[0].chunk.first_position == 3 and whole[:3] + ids == whole


@pytest.mark.parametrize(
    ("fields", "code", "text"),
    [
        ({"variant_digest": "sha256:" + "0" * 64}, grpc.StatusCode.FAILED_PRECONDITION, "this worker serves"),
        ({"model": "other"}, grpc.StatusCode.FAILED_PRECONDITION, "glm-tiny"),
        ({"token_ids": [4096]}, grpc.StatusCode.INVALID_ARGUMENT, "4096 is no token"),
        ({"token_ids": [5] * 2048}, grpc.StatusCode.INVALID_ARGUMENT, "context is 2048"),
        ({"token_ids": [5] * 2000, "max_tokens": 100}, grpc.StatusCode.INVALID_ARGUMENT, "exceed the context"),
        ({"resumed_tokens": 20}, grpc.StatusCode.INVALID_ARGUMENT, "resumed_tokens"),
        ({"stop_token_ids": [99_999]}, grpc.StatusCode.INVALID_ARGUMENT, "99999"),
        ({"request_id": ""}, grpc.StatusCode.INVALID_ARGUMENT, "request_id"),
        ({"tenant": ""}, grpc.StatusCode.INVALID_ARGUMENT, "tenant"),
    ],
    ids=lambda value: str(value)[:30],
)
async def test_what_cannot_be_served_is_refused(
    stub: rpc.SparseInferenceServiceStub, fields: dict[str, object], code: grpc.StatusCode, text: str
) -> None:
    """Wrong variant, model, token or length: a typed error that names the limit and the value seen."""
    seen, details = await refusal(stub.Generate(ask(**fields)))  # type: ignore[arg-type]
    assert seen is code and text in details


async def test_more_than_the_queue_holds_is_refused_and_the_rest_is_served(
    stub: rpc.SparseInferenceServiceStub,
) -> None:
    """Of 20 at once over 4 slots and 2 places, each is served whole or told to come back; none hangs."""
    results = await asyncio.gather(
        *(collect(stub.Generate(ask([n + 10] * 40, max_tokens=60, tenant=f"q{n}"))) for n in range(20)),
        return_exceptions=True,
    )
    refused = [r for r in results if isinstance(r, grpc.aio.AioRpcError)]
    served = [r for r in results if not isinstance(r, BaseException)]
    assert len(refused) + len(served) == 20 and len(served) >= 4
    assert all(error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED for error in refused)
    assert all(len(ids) == 60 for ids, _, _ in served)


async def test_cancelling_frees_the_slot(stub: rpc.SparseInferenceServiceStub) -> None:
    """A caller that goes away leaves no running request behind."""
    before = await stub.GetLoad(pb.GetLoadRequest())
    call = stub.Generate(ask(max_tokens=LONG))
    async for _ in call:
        call.cancel()
        break
    await was_left(stub, before)


async def test_a_deadline_ends_the_stream(stub: rpc.SparseInferenceServiceStub) -> None:
    """When the caller's time is up the stream ends with DEADLINE_EXCEEDED and the slot is free."""
    before = await stub.GetLoad(pb.GetLoadRequest())
    code, _ = await refusal(stub.Generate(ask(max_tokens=LONG), timeout=0.3))
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    await was_left(stub, before)


async def test_the_model_is_described(stub: rpc.SparseInferenceServiceStub) -> None:
    """GetModelInfo tells what a scheduler and a gateway need."""
    info = await stub.GetModelInfo(pb.GetModelInfoRequest())
    assert (info.model, info.architecture, info.context_tokens, info.block_tokens) == ("glm-tiny", "glm", 2048, 16)
    assert info.parameters == 11_015_040 and info.tokenizer_digest.startswith("sha256:")


async def test_sigterm_finishes_what_runs_and_refuses_the_rest() -> None:
    """A draining worker ends its stream well, then exits with status 0."""
    with running("services.sparse_inference", AUTOGLM_MESH_ADDRESS="127.0.0.1:1") as service:
        async with grpc.aio.insecure_channel(service.address) as channel:
            stub = rpc.SparseInferenceServiceStub(channel)
            call = stub.Generate(ask(max_tokens=100))
            count = 0
            async for message in call:
                if count == 0:
                    service.signal(signal.SIGTERM)
                count += len(message.chunk.token_ids)
            assert count == 100
        assert await asyncio.to_thread(service.wait) == 0


def test_a_missing_model_is_one_clear_line() -> None:
    """A wrong directory ends the program with status 2 and names the setting."""
    with running("services.sparse_inference", ready=None, AUTOGLM_MODEL_DIR="nowhere") as service:
        assert service.wait() == 2
        assert any("AUTOGLM_MODEL_DIR: nowhere" in str(line.get("text")) for line in service.lines)
