"""Keyword arguments become the request they describe, and mistakes are named before anything is sent."""

from __future__ import annotations

from typing import Any, cast

import pytest
from autoglm import GenerateOptions, InvalidRequestError, Message, Model, NotFoundError
from autoglm.requests import conversation, count_request, generate_request, sole_model


def build(prompt: Any = "hi", messages: Any = None, token_ids: Any = None, **options: Any) -> Any:
    return generate_request(prompt, messages, token_ids, cast("GenerateOptions", options))


def test_every_option_reaches_its_field() -> None:
    """Nothing that a caller sets is dropped on the way."""
    request = build(
        max_tokens=5, temperature=0.5, top_p=0.25, top_k=3, min_p=0.125, seed=2**63 - 1, stop=["a", "b"], n=2,
        logprobs=True, top_logprobs=4, presence_penalty=1.0, frequency_penalty=-1.0, repetition_penalty=1.5,
        logit_bias={7: -100.0}, ignore_eos=True,
    )  # fmt: skip
    sampling = request.sampling
    assert (request.text, request.max_tokens, list(request.stop), request.choices) == ("hi", 5, ["a", "b"], 2)
    assert (request.logprobs, request.top_logprobs, request.ignore_eos) == (True, 4, True)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.25, 3, 0.125)
    assert sampling.seed == 2**63 - 1
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (1.0, -1.0, 1.5)
    assert [(entry.token_id, entry.bias) for entry in sampling.logit_bias] == [(7, -100.0)]


def test_options_left_out_or_none_stay_unset() -> None:
    """Defaults belong to the mesh; zero is a value and is sent."""
    assert build(temperature=None, stop=None) == build()
    assert not build().HasField("sampling")
    assert build(temperature=0).sampling.HasField("temperature")


def test_an_answer_can_be_constrained_one_way() -> None:
    """A schema may be a mapping or its text; two constraints are refused before anything is sent."""
    assert build(json_schema={"type": "null"}, min_tokens=2).json_schema == '{"type":"null"}'
    assert build(json_schema="").WhichOneof("constraint") == "json_schema"
    assert build(regex="a").regex == "a" and build(grammar="start: A").grammar == "start: A"
    for options in ({"regex": "a", "grammar": "b"}, {"json_schema": {"a": {1}}}, {"regex": 5}):
        with pytest.raises(InvalidRequestError):
            build(**options)


def test_a_lone_stop_string_is_one_stop_string() -> None:
    """It is not taken apart into characters."""
    assert list(build(stop="END").stop) == ["END"]


def test_alternatives_imply_logprobs() -> None:
    """Asking for alternatives is asking for log-probabilities."""
    assert build(top_logprobs=2).logprobs


def test_the_three_forms_of_a_prompt() -> None:
    """Text, messages (dataclasses or mappings) and ids each fill their own form, empty ones included."""
    assert build("").WhichOneof("prompt") == "text"
    chat = build(None, [Message("system", "s"), {"role": "user", "content": "ü"}])
    assert [(turn.role, turn.content) for turn in chat.chat.messages] == [("system", "s"), ("user", "ü")]
    assert list(build(None, None, [1, 2]).token_ids.token_ids) == [1, 2]
    assert build(None, None, []).WhichOneof("prompt") == "token_ids"
    assert count_request(None, [Message("user", "x")]).WhichOneof("prompt") == "chat"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"prompt": None}, "got none"),
        ({"messages": [Message("user", "x")]}, "prompt and messages"),
        ({"prompt": 3}, "prompt:"),
        ({"prompt": "\ud800"}, "prompt:"),
        ({"top_k": -1}, "top_k:"),
        ({"top_k": 1.5}, "top_k:"),
        ({"n": 2**32}, "n:"),
        ({"seed": -1}, "seed:"),
        ({"temperature": "hot"}, "temperature:"),
        ({"stop": [3]}, "stop:"),
        ({"stop": 3}, "stop:"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias:"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias:"),
        ({"logit_bias": [1]}, "logit_bias:"),
        ({"prompt": None, "token_ids": [-1]}, "token_ids:"),
        ({"prompt": None, "token_ids": 5}, "token_ids:"),
        ({"prompt": None, "messages": "hello"}, "messages:"),
        ({"prompt": None, "messages": 5}, "messages:"),
        ({"prompt": None, "messages": [{"role": "user"}]}, "messages[0]:"),
        ({"prompt": None, "messages": [Message("user", None)]}, "messages[0].content:"),  # type: ignore[arg-type]
    ],
)
def test_a_mistake_is_named(arguments: dict[str, Any], named: str) -> None:
    """The error names the argument, and is the same kind the mesh's own refusal has."""
    with pytest.raises(InvalidRequestError) as caught:
        build(**arguments)
    assert named in str(caught.value)


def test_an_unknown_option_is_a_type_error_with_a_hint() -> None:
    """A misspelt option is never silently ignored."""
    with pytest.raises(TypeError, match="did you mean 'max_tokens'"):
        build(max_token=3)


def test_a_chat_can_be_one_string() -> None:
    """A string is one user message; the system message comes first; neither changes the caller's list."""
    assert conversation("hi", "be kind") == [Message("system", "be kind"), Message("user", "hi")]
    turns = [Message("user", "a")]
    conversation(turns, "s")
    assert turns == [Message("user", "a")]


def test_the_default_model_must_be_unambiguous() -> None:
    """One served model is the default; none or several is an error that says what there is."""
    one, two = Model("a", "", 1, 1, 1), Model("b", "", 1, 1, 1)
    assert sole_model([one]) == "a"
    with pytest.raises(InvalidRequestError, match="a, b"):
        sole_model([one, two])
    with pytest.raises(NotFoundError):
        sole_model([])
