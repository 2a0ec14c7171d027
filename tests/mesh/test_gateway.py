"""The gateway's public face over real sockets: gRPC, REST and the OpenAI client, with scripted neighbours."""

from __future__ import annotations

import gzip
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import httpx
import openai
import pytest
import pytest_asyncio
from autoglm.gateway.v1 import gateway_pb2 as pb
from autoglm.sparse_inference.v1 import sparse_inference_pb2 as worker_pb
from autoglm.type.v1 import generation_pb2

from tests.fakes.gateway_peers import BOS, CONTEXT_TOKENS, LENGTH, MODEL, USER, VARIANT, Peers, breaks, says
from tests.fakes.gateway_process import GatewayUnderTest, gateway_over, listening_peers

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
TEXT: dict[str, Any] = {"model": MODEL, "prompt": "hi"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[Peers]:
    async with listening_peers() as peers:
        yield peers


@pytest.fixture(scope="module")
def gateway(server: Peers) -> Iterator[GatewayUnderTest]:
    with gateway_over(
        server.address, AUTOGLM_OTLP_ENDPOINT=server.address, AUTOGLM_MAX_BODY_BYTES="20000",
        AUTOGLM_DEFAULT_MAX_TOKENS="50", AUTOGLM_ASKED_HEADER_BYTES="128",
    ) as one:  # fmt: skip
        yield one


@pytest.fixture
def peers(server: Peers) -> Peers:
    server.reset()
    return server


@pytest_asyncio.fixture(loop_scope="module")
async def rest(gateway: GatewayUnderTest) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=gateway.rest_url, timeout=20) as client:
        yield client


@pytest_asyncio.fixture(loop_scope="module")
async def client(gateway: GatewayUnderTest) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=gateway.rest_url + "/v1", api_key="unused", max_retries=0, timeout=20
    ) as one:
        yield one


async def ask(gateway: GatewayUnderTest, **fields: Any) -> list[pb.GenerateResponse]:
    async with gateway.stub() as stub:
        request = pb.GenerateRequest(**({"model": MODEL, "text": "hi"} | fields))
        return [message async for message in stub.Generate(request, timeout=20)]


def joined(messages: list[pb.GenerateResponse], choice: int = 0) -> str:
    return "".join(m.delta.text for m in messages if m.HasField("delta") and m.delta.choice == choice)


async def test_a_grpc_stream_is_text_finish_usage(gateway: GatewayUnderTest, peers: Peers) -> None:
    """Deltas, then one finish, then the usage; every message names the request and the variant; no half characters."""
    peers.scripts = [says("Hello, wörld!", cached=1)]
    messages = await ask(gateway)
    assert joined(messages) == "Hello, wörld!"
    assert [m.WhichOneof("event") for m in messages[-2:]] == ["finish", "usage"]
    assert messages[-2].finish.reason == generation_pb2.FINISH_REASON_STOP
    usage = messages[-1].usage
    assert (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens) == (3, 1, 14)
    assert {m.variant_digest for m in messages} == {VARIANT}
    assert len({m.request_id for m in messages}) == 1 and messages[0].request_id.startswith("req-")
    tokens = [token for m in messages for token in m.delta.tokens]
    assert b"".join(token.content for token in tokens).decode() == "Hello, wörld!"
    assert not tokens[0].HasField("logprob")


async def test_a_constraint_reaches_the_worker(gateway: GatewayUnderTest, peers: Peers) -> None:
    """Each kind, and the least length; an impossible length is refused before."""
    await ask(gateway, regex="[ab]+", min_tokens=3, max_tokens=5)
    await ask(gateway, json_schema="")
    first, second = (call.request for call in peers.calls)
    assert (first.regex, first.min_tokens) == ("[ab]+", 3)
    assert second.WhichOneof("constraint") == "json_schema" and second.json_schema == ""
    with pytest.raises(grpc.aio.AioRpcError, match="min_tokens"):
        await ask(gateway, min_tokens=6, max_tokens=5)


async def test_the_worker_is_asked_exactly(gateway: GatewayUnderTest, peers: Peers) -> None:
    """Prompt ids, sampling, limits, tenant, seed and the remaining deadline reach the worker."""
    sampling = generation_pb2.SamplingParams(temperature=0.5, top_k=7, seed=9)
    await ask(gateway, sampling=sampling, max_tokens=5, ignore_eos=True)
    (call,) = peers.calls
    request = call.request
    assert list(request.token_ids) == [BOS, *b"hi"]
    assert request.sampling == sampling
    assert (request.max_tokens, request.ignore_eos, request.tenant) == (5, True, "public")
    assert request.model == MODEL and not request.variant_digest
    assert call.remaining_s is not None and 0 < call.remaining_s < 21  # gRPC rounds up on the wire


async def test_the_picker_reads_a_prompt_in_a_header_where_it_fits(gateway: GatewayUnderTest, peers: Peers) -> None:
    """The header says what placement reads of the request, and nothing else; a longer prompt is in the body alone."""
    for size, is_told in ((20, True), (120, False)):
        await ask(gateway, text="x" * size, max_tokens=5)
        call = peers.calls[-1]
        request = call.request
        told = call.metadata.get("x-autoglm-asked-bin")
        assert (told is not None) == is_told
        if told is not None:
            wanted = worker_pb.GenerateRequest(
                request_id=request.request_id, model=MODEL, token_ids=request.token_ids, max_tokens=5, tenant="public"
            )
            assert worker_pb.GenerateRequest.FromString(told) == wanted


async def test_a_chat_goes_through_the_template(gateway: GatewayUnderTest, peers: Peers) -> None:
    """Messages are rendered by the tokenizer; token ids are taken as they are."""
    await ask(gateway, text=None, chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")]))
    await ask(gateway, text=None, token_ids=pb.TokenIds(token_ids=[1, 2]))
    assert list(peers.calls[0].request.token_ids) == [USER, *b"user:hi\n"]
    assert list(peers.calls[1].request.token_ids) == [1, 2]


async def test_the_gateway_chooses_one_seed(gateway: GatewayUnderTest, peers: Peers) -> None:
    """Without a seed the gateway chooses one for all choices; each choice has its own index and request name."""
    messages = await ask(gateway, choices=3)
    assert all(joined(messages, choice) == "Hello, wörld!" for choice in range(3))
    assert sorted(m.finish.choice for m in messages if m.HasField("finish")) == [0, 1, 2]
    assert messages[-1].usage.prompt_tokens == 3 and messages[-1].usage.completion_tokens == 3 * 14
    requests = [call.request for call in peers.calls]
    assert len({request.sampling.seed for request in requests}) == 1 and requests[0].sampling.HasField("seed")
    assert sorted(request.choice_index for request in requests) == [0, 1, 2]
    assert len({request.request_id for request in requests}) == 3


@pytest.mark.parametrize("tokens_per_chunk", [1, 3, 100])
async def test_a_stop_string_ends_the_stream(gateway: GatewayUnderTest, peers: Peers, tokens_per_chunk: int) -> None:
    """Text, count and finish are the same however the worker chunks; the worker is told to stop."""
    peers.scripts = [says("one END two" * 20, tokens_per_chunk)]
    messages = await ask(gateway, stop=["END", "never"])
    assert joined(messages) == "one "
    finish = next(m.finish for m in messages if m.HasField("finish"))
    assert (finish.reason, finish.stop) == (generation_pb2.FINISH_REASON_STOP, "END")
    assert messages[-1].usage.completion_tokens == 7
    await peers.calls[0].ended.wait()


async def test_logprobs_come_with_bytes(gateway: GatewayUnderTest, peers: Peers) -> None:
    """Each token has its own log-probability and alternatives, with bytes even inside a character."""
    peers.scripts = [says("aö", 2)]
    messages = await ask(gateway, logprobs=True, top_logprobs=2)
    tokens = [token for m in messages for token in m.delta.tokens]
    assert [token.content for token in tokens] == [b"a", b"\xc3", b"\xb6"]
    assert all(token.logprob == -0.5 for token in tokens)
    assert [(other.content, other.logprob) for other in tokens[0].top] == [(b"a", -0.5), (b"b", -1.5)]


async def test_limits_name_both_numbers(gateway: GatewayUnderTest, peers: Peers) -> None:
    """A prompt or an answer that cannot fit the context is refused before any worker is asked."""
    for fields in ({"text": "x" * 500}, {"max_tokens": CONTEXT_TOKENS}):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(gateway, **fields)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert str(CONTEXT_TOKENS) in (caught.value.details() or "")
    assert peers.calls == []
    await ask(gateway, max_tokens=CONTEXT_TOKENS - 3)
    await ask(gateway, text="x" * 100)
    assert [call.request.max_tokens for call in peers.calls] == [CONTEXT_TOKENS - 3, CONTEXT_TOKENS - 101]


async def test_bad_grpc_requests_are_refused(gateway: GatewayUnderTest, peers: Peers) -> None:
    """No prompt, an unknown model and a broken bound each have their own status."""
    for fields, code in (
        ({"text": None}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"model": "other"}, grpc.StatusCode.NOT_FOUND),
        ({"choices": 99}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"top_logprobs": 2}, grpc.StatusCode.INVALID_ARGUMENT),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(gateway, **fields)
        assert caught.value.code() is code
        assert "x-request-id" in dict(caught.value.trailing_metadata() or ()) or "choices" in fields


async def test_count_and_list(gateway: GatewayUnderTest, peers: Peers) -> None:
    """CountTokens counts with the model's tokenizer; ListModels says what the worker says."""
    async with gateway.stub() as stub:
        count = await stub.CountTokens(pb.CountTokensRequest(model=MODEL, text="hello"))
        models = (await stub.ListModels(pb.ListModelsRequest())).models
    assert count.tokens == 6 and count.tokenizer_digest
    assert [(m.name, m.variant_digest, m.context_tokens) for m in models] == [(MODEL, VARIANT, CONTEXT_TOKENS)]
    assert models[0].created_unix_s > 1_700_000_000


async def test_another_tokenizer_fails_closed(gateway: GatewayUnderTest, peers: Peers) -> None:
    """Ids of a tokenizer that the model was not made with never reach a worker."""
    peers.tokenizer_digest = "sha256:" + "00" * 32
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask(gateway)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert peers.calls == []


async def test_openai_chat(client: openai.AsyncOpenAI, peers: Peers) -> None:
    """The official client reads a whole chat answer."""
    peers.scripts = [says("Hello, wörld!", cached=2)]
    answer = await client.chat.completions.create(**CHAT, max_completion_tokens=20, user="me")
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "Hello, wörld!", "stop")
    assert answer.system_fingerprint == VARIANT and answer.usage is not None
    assert (answer.usage.completion_tokens, answer.usage.total_tokens) == (14, 23)
    assert answer.usage.prompt_tokens_details is not None and answer.usage.prompt_tokens_details.cached_tokens == 2


async def test_openai_chat_stream(client: openai.AsyncOpenAI, peers: Peers) -> None:
    """The official client reads a chat stream of two choices with usage."""
    peers.scripts = [says("Grüße", reason=LENGTH)]
    texts, reasons, usage = {0: "", 1: ""}, {}, None
    stream = await client.chat.completions.create(**CHAT, n=2, stream=True, stream_options={"include_usage": True})
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert texts == {0: "Grüße", 1: "Grüße"} and reasons == {0: "length", 1: "length"}
    assert usage is not None and usage.completion_tokens == 14


async def test_openai_logprobs(client: openai.AsyncOpenAI, peers: Peers) -> None:
    """The official client reads log-probabilities in both shapes."""
    peers.scripts = [says("ab")]
    chat = await client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=2)
    assert chat.choices[0].logprobs is not None
    content = chat.choices[0].logprobs.content or []
    assert [(one.token, one.logprob, len(one.top_logprobs)) for one in content] == [("a", -0.5, 2), ("b", -0.5, 2)]
    text = await client.completions.create(**TEXT, logprobs=1)
    assert text.choices[0].logprobs is not None
    assert text.choices[0].logprobs.tokens == ["a", "b"] and text.choices[0].logprobs.text_offset == [0, 1]
    assert text.choices[0].logprobs.top_logprobs == [{"a": -0.5}, {"b": -0.5}]


async def test_openai_completions_of_several_prompts(client: openai.AsyncOpenAI, peers: Peers) -> None:
    """Choices are numbered across prompts, and each prompt is counted once."""
    answer = await client.completions.create(model=MODEL, prompt=["a", "bb"], n=2, seed=5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage is not None and answer.usage.prompt_tokens == 2 + 3
    asked = sorted((len(call.request.token_ids), call.request.choice_index) for call in peers.calls)
    assert asked == [(2, 0), (2, 1), (3, 0), (3, 1)]
    assert {call.request.sampling.seed for call in peers.calls} == {5}


async def test_openai_completion_stream_with_stop(client: openai.AsyncOpenAI, peers: Peers) -> None:
    """A stop string ends a REST stream in the same way."""
    peers.scripts = [says("one\n\ntwo")]
    stream = await client.completions.create(**TEXT, stream=True, stop=["\n\n"])
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks) == "one"
    assert chunks[-1].choices[0].finish_reason == "stop"


async def test_openai_errors_and_models(client: openai.AsyncOpenAI, peers: Peers) -> None:
    """The official client raises its own exceptions: unknown model, bad value, too busy with the time to wait."""
    with pytest.raises(openai.NotFoundError) as unknown:
        await client.chat.completions.create(**(CHAT | {"model": "gpt-4"}))
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        await client.completions.create(**(TEXT | {"prompt": "x" * 300}))
    assert bad.value.code == "context_length_exceeded" and bad.value.param == "prompt"
    trailers = (("autoglm-reason", "TOO_BUSY"), ("retry-after-ms", "2500"))
    peers.scripts = [breaks("", grpc.StatusCode.RESOURCE_EXHAUSTED, trailers)]
    with pytest.raises(openai.RateLimitError) as busy:
        await client.completions.create(**TEXT, stream=True)
    assert busy.value.response.headers["retry-after"] == "3"
    models = [model async for model in client.models.list()]
    assert [model.id for model in models] == [MODEL]
    assert (await client.models.retrieve(MODEL)).owned_by == "autoglm"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("other/model")


async def test_the_event_stream_on_the_wire(rest: httpx.AsyncClient, peers: Peers) -> None:
    """Data lines only, [DONE] last, ids in headers."""
    peers.scripts = [says("a\nb")]
    answer = await rest.post("/v1/chat/completions", json=CHAT | {"stream": True})
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-request-id"].startswith("req-") and len(answer.headers["x-trace-id"]) == 32
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    bodies = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert all(body["object"] == "chat.completion.chunk" and "usage" not in body for body in bodies)


@pytest.mark.parametrize(
    ("method", "path", "options", "status"),
    [
        ("POST", "/v1/chat/completions", {"content": "{", "headers": {"content-type": "application/json"}}, 400),
        ("POST", "/v1/chat/completions", {"json": CHAT | {"temperature": "x"}}, 400),
        ("POST", "/v1/chat/completions", {"json": CHAT | {"tools": [{}]}}, 400),
        ("POST", "/v1/completions", {"content": "prompt=x", "headers": {"content-type": "text/plain"}}, 415),
        ("POST", "/v1/completions", {"json": TEXT | {"prompt": "x" * 30_000}}, 413),
        ("GET", "/v1/completions", {}, 405),
        ("GET", "/v1/nothing", {}, 404),
        ("GET", "/v1/models/none", {}, 404),
        ("GET", "/v1/models/", {}, 404),
    ],
)
async def test_every_refusal_has_the_same_shape(
    rest: httpx.AsyncClient, peers: Peers, method: str, path: str, options: dict[str, Any], status: int
) -> None:
    """Whatever is wrong, the body is {"error": {message, type, param, code}} and the status fits."""
    answer = await rest.request(method, path, **options)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert peers.calls == []


async def test_a_compressed_body_is_told_from_a_broken_one(rest: httpx.AsyncClient, peers: Peers) -> None:
    """gzip is refused as gzip, not as bad JSON; `identity` is no encoding at all."""
    raw = json.dumps(TEXT).encode()
    headers = {"content-type": "application/json"}
    answer = await rest.post(
        "/v1/completions", content=gzip.compress(raw), headers=headers | {"content-encoding": "gzip"}
    )
    assert answer.status_code == 415 and answer.json()["error"]["code"] == "unsupported_content_encoding"
    assert "gzip" in answer.json()["error"]["message"] and peers.calls == []
    answer = await rest.post("/v1/completions", content=raw, headers=headers | {"content-encoding": "identity"})
    assert answer.status_code == 200


async def test_no_model_is_not_a_model(rest: httpx.AsyncClient, peers: Peers) -> None:
    """A trailing slash is an unknown path, not a model without a name."""
    assert (await rest.get("/v1/models/")).json()["error"]["code"] == "unknown_path"


async def test_refusals_are_counted(rest: httpx.AsyncClient, peers: Peers) -> None:
    """Every REST answer is on the metrics page, those refused before any work too, by status and never by caller."""

    async def count(status: int) -> float:
        line = f'autoglm_gateway_rest_responses_total{{path="/v1/completions",status="{status}"}} '
        page = (await rest.get("/metrics")).text
        return next((float(row.removeprefix(line)) for row in page.splitlines() if row.startswith(line)), 0.0)

    before = [await count(status) for status in (200, 400)]
    await rest.post("/v1/completions", json=TEXT)
    await rest.post("/v1/completions", json=TEXT | {"temperature": -1})
    await rest.post("/v1/completions?caller=someone", content="{", headers={"content-type": "application/json"})
    assert [await count(status) for status in (200, 400)] == [before[0] + 1, before[1] + 2]
    assert "someone" not in (await rest.get("/metrics")).text


async def test_a_body_without_a_length_is_bounded_too(rest: httpx.AsyncClient, peers: Peers) -> None:
    """Reading stops at the bound even when the client does not say how much it will send."""

    async def parts() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b" " * 1000

    answer = await rest.post("/v1/completions", content=parts(), headers={"content-type": "application/json"})
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"


async def test_health_and_metrics(gateway: GatewayUnderTest, rest: httpx.AsyncClient, peers: Peers) -> None:
    """Live and healthy; the metrics page counts generations under known names only."""
    await ask(gateway)
    with pytest.raises(grpc.aio.AioRpcError):
        await ask(gateway, model="invented-name")
    assert (await rest.get("/live")).status_code == 200
    assert (await rest.get("/health")).json()["status"] == "ok"
    page = (await rest.get("/metrics")).text
    label = f'{{gen_ai_operation_name="text_completion",gen_ai_request_model="{MODEL}"'
    assert f"gen_ai_server_time_to_first_token_seconds_count{label}}}" in page
    assert f"gen_ai_server_time_per_output_token_seconds_count{label}}}" in page
    assert f'gen_ai_server_request_duration_seconds_count{{error_type="",{label[1:]}}}' in page
    assert 'autoglm_gateway_choices_total{finish_reason="stop"}' in page
    assert "invented-name" not in page


async def test_a_rest_request_continues_its_callers_trace(rest: httpx.AsyncClient, peers: Peers) -> None:
    """The caller's trace id is in the header, in the worker's metadata and on a span with GenAI attributes."""
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    headers = {"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"}
    answer = await rest.post("/v1/chat/completions", json=CHAT | {"seed": 4}, headers=headers)
    assert answer.headers["x-trace-id"] == trace_id
    assert trace_id in peers.calls[0].metadata["traceparent"]
    raw = bytes.fromhex(trace_id)
    span = await peers.span(lambda one: one.trace_id == raw and one.name == f"chat {MODEL}")
    facts = {pair.key: pair.value for pair in span.attributes}
    assert facts["gen_ai.operation.name"].string_value == "chat"
    assert facts["gen_ai.provider.name"].string_value == "autoglm"
    assert facts["gen_ai.usage.output_tokens"].int_value == 14
    assert facts["gen_ai.response.time_to_first_chunk"].double_value > 0
    for child in ("tokenize", "stream"):
        assert (await peers.span(lambda one: one.trace_id == raw and one.name == child)).parent_span_id == span.span_id  # noqa: B023
    server = await peers.span(lambda one: one.trace_id == raw and one.name == "POST /v1/chat/completions")
    assert span.parent_span_id == server.span_id


async def test_a_grpc_request_tells_its_trace(gateway: GatewayUnderTest, peers: Peers) -> None:
    """The trailing metadata name the request and the trace."""
    async with gateway.stub() as stub:
        metadata = (("traceparent", "00-0af7651916cd43dd8448eb211c80319d-b7ad6b7169203331-01"),)
        call = stub.Generate(pb.GenerateRequest(model=MODEL, text="hi"), metadata=metadata)
        messages = [message async for message in call]
        trailers = dict(await call.trailing_metadata())
    assert trailers["x-trace-id"] == "0af7651916cd43dd8448eb211c80319d"
    assert trailers["x-request-id"] == messages[0].request_id
