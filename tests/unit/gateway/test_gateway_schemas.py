"""REST bodies: what is accepted, what is refused and by which name, and that ranges are those of the gRPC contract."""

from __future__ import annotations

import json
from typing import Any

import annotated_types
import pytest
from autoglm.gateway.v1 import gateway_pb2
from autoglm.type.v1 import generation_pb2
from pydantic import ValidationError

from services.chassis.bounds import bounds_of
from services.gateway.requests import Chat, Constraint, Ids, Message, Request, Text
from services.gateway.rest import constraints, schemas
from services.gateway.rest.errors import ApiError, from_validation
from services.gateway.rest.schemas import ChatBody, CompletionBody

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TEXT: dict[str, Any] = {"model": "m", "prompt": "hi"}


def chat(**fields: Any) -> Request:
    return ChatBody.model_validate_json(json.dumps(CHAT | fields)).request()


def text(**fields: Any) -> Request:
    return CompletionBody.model_validate_json(json.dumps(TEXT | fields)).request()


def refusal(body: type[ChatBody] | type[CompletionBody], raw: bytes) -> ApiError:
    with pytest.raises(ValidationError) as caught:
        body.model_validate_json(raw)
    return from_validation(caught.value.errors(include_url=False, include_input=False))


def test_a_chat_body_becomes_a_request() -> None:
    """Every understood field reaches the core under its own meaning."""
    request = chat(
        max_tokens=5, max_completion_tokens=7, n=2, stop="x", seed=3, temperature=0, top_p=0.5, top_k=-1, min_p=0.1,
        presence_penalty=1, frequency_penalty=-1, repetition_penalty=1.5, logit_bias={"7": -100}, ignore_eos=True,
        logprobs=True, top_logprobs=2, user="someone", metadata={"a": "b"}, something_new=[1],
    )  # fmt: skip
    assert request.prompts == (Chat((Message("user", "hi"),)),)
    assert (request.max_tokens, request.choices, request.stop) == (7, 2, ("x",))
    assert (request.logprobs, request.top_logprobs, request.ignore_eos) == (True, 2, True)
    sampling = request.sampling
    assert (sampling.seed, sampling.temperature, sampling.top_p, sampling.top_k) == (3, 0, 0.5, 0)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.logit_bias) == (1, -1, ((7, -100.0),))


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("a", (Text("a"),)),
        (["a", "b"], (Text("a"), Text("b"))),
        ([1, 2], (Ids((1, 2)),)),
        ([[1], [2, 3]], (Ids((1,)), Ids((2, 3)))),
    ],
)
def test_a_prompt_has_four_forms(prompt: object, wanted: object) -> None:
    """Text, several texts, token ids and several lists of token ids are all prompts."""
    assert text(prompt=prompt).prompts == wanted


def test_legacy_logprobs_count_alternatives() -> None:
    """`logprobs: 0` asks for the chosen tokens only; absent asks for nothing."""
    assert (text(logprobs=0).logprobs, text(logprobs=0).top_logprobs) == (True, 0)
    assert (text(logprobs=3).logprobs, text(logprobs=3).top_logprobs) == (True, 3)
    assert text().logprobs is False


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"n": 1.5}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": 7}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"model": ""}, "model"),
        ({"model": None}, "model"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"seed": -1}, "seed"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": 1}}}, "response_format"),
        ({"guided_json": 5}, "guided_json"),
        ({"guided_regex": ""}, "guided_regex"),
        ({"guided_regex": "a" * 65_537}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": ["a", ""]}, "guided_choice"),
        ({"guided_choice": ["a"] * 1025}, "guided_choice"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs"),
        ({"structured_outputs": {}}, "structured_outputs"),
    ],
)
def test_a_bad_value_is_named(fields: dict[str, Any], param: str) -> None:
    """A wrong type or range is a 400 that names the parameter."""
    error = refusal(ChatBody, json.dumps(CHAT | fields).encode())
    assert (error.status, error.kind, error.param) == (400, "invalid_request_error", param)
    assert param in error.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
    ],
)
def test_a_chat_feature_that_is_not_here_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    """Nothing that would change the answer is silently ignored."""
    error = refusal(ChatBody, json.dumps(CHAT | fields).encode())
    assert (error.status, error.param, error.code) == (400, param, "unsupported_parameter")
    assert "not supported yet" in error.message


@pytest.mark.parametrize(
    ("fields", "param"), [({"echo": True}, "echo"), ({"suffix": "x"}, "suffix"), ({"best_of": 3}, "best_of")]
)
def test_a_completion_feature_that_is_not_here_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    """Nothing that would change the answer is silently ignored."""
    error = refusal(CompletionBody, json.dumps(TEXT | fields).encode())
    assert (error.status, error.param, error.code) == (400, param, "unsupported_parameter")


def test_features_that_are_off_are_accepted() -> None:
    """Clients send the off form of what they do not use."""
    chat(tools=None, tool_choice="none", response_format={"type": "text"}, modalities=["text"])
    chat(stop=None, logit_bias=None)
    chat(tools=[], n=None, max_tokens=None, stream=None)
    text(echo=False, suffix=None, best_of=2, n=2)


@pytest.mark.parametrize(
    ("fields", "kind", "text_of_it"),
    [
        ({"response_format": {"type": "json_object"}}, "json_schema", ""),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "null"}}}},
         "json_schema", '{"type":"null"}'),
        ({"guided_json": {"type": "null"}}, "json_schema", '{"type":"null"}'),
        ({"guided_json": '{"type": "null"}'}, "json_schema", '{"type": "null"}'),
        ({"guided_regex": "[ab]"}, "regex", "[ab]"),
        ({"guided_grammar": "start: A"}, "grammar", "start: A"),
        ({"guided_choice": ['say "yes"', "nö"]}, "grammar", 'start: "say \\"yes\\"" | "nö"'),
        ({"structured_outputs": {"regex": "[ab]", "json": None}}, "regex", "[ab]"),
        ({"structured_outputs": {"json_object": True}}, "json_schema", ""),
    ],
)  # fmt: skip
def test_a_constraint_has_the_notations_of_openai_and_vllm(fields: dict[str, Any], kind: Any, text_of_it: str) -> None:
    """Each of them becomes the one constraint of the contract, for chats and for completions."""
    assert chat(**fields).constraint == text(**fields).constraint == Constraint(kind, text_of_it)


def test_only_one_constraint_may_be_given() -> None:
    """Two are refused, both by name; none is none."""
    error = refusal(ChatBody, json.dumps(CHAT | {"guided_regex": "a", "guided_json": {}}).encode())
    assert error.status == 400 and "guided_json and guided_regex" in error.message
    assert chat(response_format={"type": "text"}, guided_regex=None).constraint is None
    assert chat(min_tokens=3).min_tokens == 3


def test_text_parts_are_joined() -> None:
    """Content may be a list of text parts."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat(messages=[{"role": "user", "content": parts}]).prompts == (Chat((Message("user", "ab"),)),)


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"nonsense", b'{"model": "\xff"}', b"[" * 100_000, b'{"model": "m", "prompt": "\\ud800"}',
     b'{"model": "m", "prompt": "a", "temperature": NaN}', b"[]", b'"text"'],
)  # fmt: skip
def test_what_is_no_json_object_is_refused(raw: bytes) -> None:
    """Malformed JSON, invalid UTF-8, lone surrogates, deep nesting and NaN are a 400, never a crash."""
    assert refusal(CompletionBody, raw).status == 400


def test_too_many_prompts_are_refused() -> None:
    """The list of prompts is bounded."""
    assert refusal(CompletionBody, json.dumps(TEXT | {"prompt": ["a"] * 9}).encode()).param == "prompt"
    assert refusal(CompletionBody, json.dumps(TEXT | {"prompt": []}).encode()).param == "prompt"


SAME = [
    (schemas.Common, "temperature", generation_pb2.SamplingParams, "temperature"),
    (schemas.Common, "top_p", generation_pb2.SamplingParams, "top_p"),
    (schemas.Common, "top_k", generation_pb2.SamplingParams, "top_k"),
    (schemas.Common, "min_p", generation_pb2.SamplingParams, "min_p"),
    (schemas.Common, "presence_penalty", generation_pb2.SamplingParams, "presence_penalty"),
    (schemas.Common, "frequency_penalty", generation_pb2.SamplingParams, "frequency_penalty"),
    (schemas.Common, "repetition_penalty", generation_pb2.SamplingParams, "repetition_penalty"),
    (schemas.Common, "seed", generation_pb2.SamplingParams, "seed"),
    (schemas.Common, "n", gateway_pb2.GenerateRequest, "choices"),
    (schemas.Common, "min_tokens", gateway_pb2.GenerateRequest, "min_tokens"),
    (schemas.Common, "max_tokens", gateway_pb2.GenerateRequest, "max_tokens"),
    (schemas.ChatBody, "top_logprobs", gateway_pb2.GenerateRequest, "top_logprobs"),
    (schemas.CompletionBody, "logprobs", gateway_pb2.GenerateRequest, "top_logprobs"),
]


@pytest.mark.parametrize(("body", "field", "message", "name"), SAME)
def test_ranges_are_those_of_the_contract(body: Any, field: str, message: Any, name: str) -> None:
    """REST and gRPC accept the same numbers."""
    bounds = bounds_of(message.DESCRIPTOR.fields_by_name[name])
    assert bounds is not None
    upper = bounds.max if bounds.HasField("max") else bounds.float_max
    (rule,) = [rule for rule in body.model_fields[field].metadata if isinstance(rule, annotated_types.Le)]
    assert rule.le == upper
    if bounds.HasField("float_min"):
        (rule,) = [rule for rule in body.model_fields[field].metadata if isinstance(rule, annotated_types.Ge)]
        assert rule.ge == pytest.approx(bounds.float_min)


def test_list_bounds_are_those_of_the_contract() -> None:
    """The hand-written limits of lists equal the declared ones."""
    fields = gateway_pb2.GenerateRequest.DESCRIPTOR.fields_by_name
    stop = bounds_of(fields["stop"])
    bias = bounds_of(generation_pb2.SamplingParams.DESCRIPTOR.fields_by_name["logit_bias"])
    ids = bounds_of(gateway_pb2.TokenIds.DESCRIPTOR.fields_by_name["token_ids"])
    assert stop is not None and bias is not None and ids is not None
    assert (schemas.MAX_STOPS, schemas.MAX_STOP_BYTES) == (stop.max_items, stop.max_bytes)
    assert schemas.MAX_BIASES == bias.max_items
    for name in ("json_schema", "regex", "grammar"):
        bounds = bounds_of(fields[name])
        assert bounds is not None and bounds.max_bytes == constraints.MAX_CONSTRAINT_BYTES
    assert (schemas.MAX_IDS, schemas.MAX_TOKEN_ID) == (ids.max_items, ids.max)
