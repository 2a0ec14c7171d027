"""Builds protobuf requests from the keyword arguments of `generate`, `stream` and `chat`.

Types are checked here, because protobuf's own complaints do not name the field; ranges are the server's business and
are declared in the contract.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias, TypedDict

from google.protobuf.message import Message as Proto

from autoglm.completion import Message, Model
from autoglm.errors import InvalidRequestError, NotFoundError
from autoglm.gateway.v1 import gateway_pb2

Messages: TypeAlias = Iterable["Message | Mapping[str, str]"]


class CallOptions(TypedDict, total=False):
    """What every call accepts beside its own arguments."""

    timeout: float | None
    """Seconds until the call fails with `DeadlineError`; None waits for ever. Default: the client's."""
    metadata: Mapping[str, str]
    """Extra call metadata, for example `traceparent`. Default: none."""


class GenerateOptions(CallOptions, total=False):
    """What `generate`, `stream` and `chat` accept. Left out or None: the model's or mesh's default."""

    model: str | None
    """Name of the model. Default: the client's, else the only one that is served."""
    max_tokens: int | None
    """Most tokens per choice; the default is the gateway's."""
    temperature: float | None
    """Divides the logits; 0 is greedy."""
    top_p: float | None
    """Keeps the smallest set of tokens whose probabilities reach this sum."""
    top_k: int | None
    """Keeps the k most likely tokens; 0 is off."""
    min_p: float | None
    """Drops tokens less likely than this share of the most likely one."""
    seed: int | None
    """Same variant, prompt and seed: same tokens, on every worker."""
    stop: str | Sequence[str] | None
    """Strings that end the text; the text stops before them."""
    n: int | None
    """Number of answers. Default 1."""
    logprobs: bool | None
    """Reports tokens with log-probabilities."""
    top_logprobs: int | None
    """Alternatives per position; more than 0 implies `logprobs`."""
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    logit_bias: Mapping[int, float] | None
    """Added to the logits of the named token ids."""
    ignore_eos: bool | None
    """Goes on past end-of-sequence tokens."""
    min_tokens: int | None
    """Ends are not drawn before the answer has this many tokens."""
    json_schema: str | Mapping[str, Any] | None
    """The answer is JSON that this schema accepts; "" stands for any object."""
    regex: str | None
    """The answer matches this regular expression as a whole."""
    grammar: str | None
    """The answer is a text of this grammar, in Lark's or GBNF's notation."""


_SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty", "repetition_penalty",
)  # fmt: skip
_PLAIN = {
    "max_tokens": "max_tokens", "n": "choices", "top_logprobs": "top_logprobs", "ignore_eos": "ignore_eos",
    "min_tokens": "min_tokens",
}  # fmt: skip
_CONSTRAINTS = ("json_schema", "regex", "grammar")


def generate_request(
    prompt: str | None, messages: Messages | None, token_ids: Iterable[int] | None, options: GenerateOptions
) -> gateway_pb2.GenerateRequest:
    """The request, its model still to be filled in. Raises `InvalidRequestError`, or TypeError for unknown names."""
    check_names(options, GenerateOptions.__optional_keys__)
    request = gateway_pb2.GenerateRequest()
    _one_prompt(prompt=prompt, messages=messages, token_ids=token_ids)
    if prompt is not None:
        _set(request, "text", prompt, "prompt")
    elif messages is not None:
        _fill_chat(request.chat, messages)
    elif token_ids is not None:
        _extend(request.token_ids.token_ids, token_ids, "token_ids")
        request.token_ids.SetInParent()
    given: Mapping[str, Any] = {key: value for key, value in options.items() if value is not None}
    for name in _SAMPLING:
        if name in given:
            _set(request.sampling, name, given[name], name)
    for name, field in _PLAIN.items():
        if name in given:
            _set(request, field, given[name], name)
    request.logprobs = bool(given.get("logprobs")) or request.top_logprobs > 0
    _constrain(request, given)
    stop = given.get("stop", ())
    _extend(request.stop, (stop,) if isinstance(stop, str) else stop, "stop")
    biases = given.get("logit_bias", {})
    if not isinstance(biases, Mapping):
        raise InvalidRequestError("logit_bias: a mapping from token ids to numbers")
    for token_id, bias in biases.items():
        entry = request.sampling.logit_bias.add()
        _set(entry, "token_id", token_id, "logit_bias")
        _set(entry, "bias", bias, "logit_bias")
    return request


def _constrain(request: gateway_pb2.GenerateRequest, given: Mapping[str, Any]) -> None:
    named = [name for name in _CONSTRAINTS if name in given]
    if len(named) > 1:
        raise InvalidRequestError(f"{' and '.join(named)} exclude each other")
    for name in named:
        value = given[name]
        if name == "json_schema" and isinstance(value, Mapping):
            try:
                value = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
            except (TypeError, ValueError, RecursionError) as error:
                raise InvalidRequestError(f"json_schema: {error}") from None
        _set(request, name, value, name)


def count_request(prompt: str | None, messages: Messages | None) -> gateway_pb2.CountTokensRequest:
    """A request to count, its model still to be filled in."""
    request = gateway_pb2.CountTokensRequest()
    _one_prompt(prompt=prompt, messages=messages)
    if prompt is not None:
        _set(request, "text", prompt, "prompt")
    elif messages is not None:
        _fill_chat(request.chat, messages)
    return request


def set_model(request: gateway_pb2.GenerateRequest | gateway_pb2.CountTokensRequest, model: str) -> None:
    """Names the model."""
    _set(request, "model", model, "model")


def sole_model(models: Sequence[Model]) -> str:
    """The model to use when the caller named none. Raises when there is no single answer."""
    if not models:
        raise NotFoundError("the gateway serves no model yet")
    if len(models) > 1:
        raise InvalidRequestError(f"name one with model=…; served are {', '.join(model.name for model in models)}")
    return models[0].name


def check_names(options: Mapping[str, object], known: Iterable[str]) -> None:
    """Raises the TypeError Python would for an unknown keyword, with the nearest known name."""
    for name in options.keys() - set(known):
        near = difflib.get_close_matches(name, list(known), n=1)
        raise TypeError(f"unexpected keyword argument {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))


def conversation(message: str | Messages, system: str | None) -> list[Message | Mapping[str, str]]:
    """The messages of a chat: a lone string is what the user says; `system` comes first."""
    if message is None:
        raise InvalidRequestError("give a message or a list of messages")
    turns: list[Message | Mapping[str, str]]
    turns = [Message("user", message)] if isinstance(message, str) else list(message)
    return turns if system is None else [Message("system", system), *turns]


def _one_prompt(**forms: object) -> None:
    given = [name for name, value in forms.items() if value is not None]
    if len(given) != 1:
        raise InvalidRequestError(
            f"give exactly one of {', '.join(forms)}; " + (f"got {' and '.join(given)}" if given else "got none")
        )


def _fill_chat(chat: gateway_pb2.Chat, messages: Messages) -> None:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Iterable):
        raise InvalidRequestError("messages: a list of messages, not a single one; for plain text use prompt")
    chat.SetInParent()
    for index, message in enumerate(messages):
        name = f"messages[{index}]"
        if isinstance(message, Message):
            role, content = message.role, message.content
        elif isinstance(message, Mapping) and message.keys() == {"role", "content"}:
            role, content = message["role"], message["content"]
        else:
            raise InvalidRequestError(f"{name}: a Message or a mapping with exactly role and content")
        entry = chat.messages.add()
        _set(entry, "role", role, f"{name}.role")
        _set(entry, "content", content, f"{name}.content")


def _set(message: Proto, field: str, value: object, name: str) -> None:
    try:
        setattr(message, field, value)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"{name}: {error}") from None


def _extend(container: Any, values: Iterable[object], name: str) -> None:
    try:
        container.extend(values)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"{name}: {error}") from None
