"""The bodies of the OpenAI-style endpoints, checked by pydantic and turned into the core's `Request`.

Ranges are those of the gRPC contract (a test compares them). Unknown fields are accepted and ignored; known features
that are not here yet are refused by name, because an answer that silently ignores them would be wrong.
"""

from __future__ import annotations

from typing import Annotated, Any, Self, TypeAlias

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_validator,
)

from services.gateway.requests import Chat, Constraint, Ids, Message, Prompt, Request, Sampling, Text
from services.gateway.rest import constraints
from services.gateway.rest.errors import Unsupported

MAX_PROMPTS, MAX_STOPS, MAX_STOP_BYTES, MAX_IDS, MAX_TOKEN_ID = 8, 16, 256, 131_072, 2_000_000
MAX_BIASES, MAX_BIAS = 1024, 100


def _stops(value: object) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("must be a string or a list of strings")
    if len(stops) > MAX_STOPS:
        raise ValueError(f"{len(stops)} stop strings, at most {MAX_STOPS} are allowed")
    if not all(1 <= len(stop.encode()) <= MAX_STOP_BYTES for stop in stops):
        raise ValueError(f"each stop string must have 1 to {MAX_STOP_BYTES} bytes")
    return tuple(stops)


def _biases(value: object) -> tuple[tuple[int, float], ...]:
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise ValueError("must be an object of token id to bias")
    if len(value) > MAX_BIASES:
        raise ValueError(f"{len(value)} entries, at most {MAX_BIASES} are allowed")
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 7 and int(key) <= MAX_TOKEN_ID):
            raise ValueError(f"{key[:32]!r} is not a token id")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -MAX_BIAS <= bias <= MAX_BIAS:
            raise ValueError(f"the bias of token {key} must be a number between -{MAX_BIAS} and {MAX_BIAS}")
    return tuple((int(key), float(bias)) for key, bias in value.items())


def _content(value: object) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        raise ValueError("must be a string or a list of text parts")
    if any(part.get("type") != "text" for part in value):
        raise Unsupported("only parts of type text can be read")
    if not all(isinstance(part.get("text"), str) for part in value):
        raise ValueError("each part of type text needs a text")
    return "".join(part["text"] for part in value)


def _prompts(value: object) -> tuple[Prompt, ...]:
    if isinstance(value, str):
        return (Text(value),)
    if not isinstance(value, list) or not value:
        raise ValueError("must be a string, a list of strings, or a list of token ids")
    if isinstance(value[0], int):
        return (_ids(value),)
    if len(value) > MAX_PROMPTS:
        raise ValueError(f"{len(value)} prompts, at most {MAX_PROMPTS} are allowed")
    return tuple(Text(one) if isinstance(one, str) else _ids(one) for one in value)


def _ids(value: object) -> Ids:
    if not isinstance(value, list) or not value:
        raise ValueError("each prompt must be a string or a list of token ids")
    if len(value) > MAX_IDS:
        raise ValueError(f"{len(value)} token ids, at most {MAX_IDS} are allowed")
    if not all(type(one) is int and 0 <= one <= MAX_TOKEN_ID for one in value):
        raise ValueError(f"token ids must be integers from 0 to {MAX_TOKEN_ID}")
    return Ids(tuple(value))


def _absent(remedy: str, *harmless: object) -> BeforeValidator:
    """Accepts a feature that is not here only in its `harmless` forms, which mean that it is off."""

    def check(value: object) -> object:
        if any(value == form and type(value) is type(form) for form in (None, [], *harmless)):
            return None
        raise Unsupported(remedy)

    return BeforeValidator(check)


Stops: TypeAlias = Annotated[tuple[str, ...], PlainValidator(_stops)]
Biases: TypeAlias = Annotated[tuple[tuple[int, float], ...], PlainValidator(_biases)]
TOOLS, TEXT_ONLY = "answers are plain text", "leave it out or ask for text"


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)


class StreamOptions(_Body):
    include_usage: bool | None = None


class Common(_Body):
    """What both kinds of completion understand."""

    model: Annotated[str, StringConstraints(min_length=1, max_length=128)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1, le=131_072)
    n: int | None = Field(None, ge=1, le=16)
    stop: Stops = ()
    seed: int | None = Field(None, ge=0, le=2**63 - 1)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=1_000_000)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10)
    logit_bias: Biases = ()
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(None, ge=0, le=131_072)
    response_format: Annotated[Constraint | None, PlainValidator(constraints.response_format)] = None
    structured_outputs: Annotated[Constraint | None, PlainValidator(constraints.structured_outputs)] = None
    guided_json: Annotated[Constraint | None, PlainValidator(constraints.guided_json)] = None
    guided_regex: Annotated[Constraint | None, PlainValidator(constraints.guided_regex)] = None
    guided_grammar: Annotated[Constraint | None, PlainValidator(constraints.guided_grammar)] = None
    guided_choice: Annotated[Constraint | None, PlainValidator(constraints.guided_choice)] = None

    @field_validator("stream_options")
    @classmethod
    def _check_stream_options(cls, value: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        if value is not None and not info.data.get("stream"):
            raise ValueError("only allowed when stream is true")
        return value

    @model_validator(mode="after")
    def _check_constraints(self) -> Self:
        constraints.only_one(self._constraints)
        return self

    @property
    def _constraints(self) -> dict[str, Constraint | None]:
        names = (
            "response_format",
            "structured_outputs",
            *(f"guided_{n}" for n in ("json", "regex", "grammar", "choice")),
        )
        return {name: getattr(self, name) for name in names}

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def _request(
        self, prompts: tuple[Prompt, ...], max_tokens: int | None, top: int | None, *, scored: bool
    ) -> Request:
        return Request(
            model=self.model,
            prompts=prompts,
            sampling=Sampling(
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=0 if self.top_k == -1 else self.top_k,  # other servers write "off" as -1
                min_p=self.min_p,
                presence_penalty=self.presence_penalty,
                frequency_penalty=self.frequency_penalty,
                repetition_penalty=self.repetition_penalty,
                seed=self.seed,
                logit_bias=self.logit_bias,
            ),
            max_tokens=max_tokens or 0,
            stop=self.stop,
            choices=self.n or 1,
            logprobs=scored,
            top_logprobs=top or 0,
            ignore_eos=bool(self.ignore_eos),
            min_tokens=self.min_tokens or 0,
            constraint=constraints.only_one(self._constraints),
        )


class ChatMessage(_Body):
    role: Annotated[str, Field(pattern="^(system|developer|user|assistant|tool)$")]
    content: Annotated[str, PlainValidator(_content)]
    name: Annotated[str, StringConstraints(max_length=64)] | None = None
    tool_calls: Annotated[Any, _absent(TOOLS)] = None


class ChatBody(Common):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=512)]
    max_completion_tokens: int | None = Field(None, ge=1, le=131_072)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Annotated[Any, _absent(TOOLS)] = None
    functions: Annotated[Any, _absent(TOOLS)] = None
    tool_choice: Annotated[Any, _absent(TOOLS, "none", "auto")] = None
    modalities: Annotated[Any, _absent(TEXT_ONLY, ["text"])] = None
    audio: Annotated[Any, _absent(TEXT_ONLY)] = None

    def request(self) -> Request:
        said = tuple(Message(message.role, message.content, message.name or "") for message in self.messages)
        wanted = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        return self._request((Chat(said),), wanted, self.top_logprobs, scored=bool(self.logprobs))


class CompletionBody(Common):
    """POST /v1/completions."""

    prompt: Annotated[tuple[Prompt, ...], PlainValidator(_prompts)]
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = Field(None, ge=1)
    echo: Annotated[Any, _absent("the prompt is not repeated", False)] = None
    suffix: Annotated[Any, _absent("text is only continued, never filled in", "")] = None

    @field_validator("best_of")
    @classmethod
    def _check_best_of(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and value != (info.data.get("n") or 1):
            raise Unsupported("leave it out or make it equal to n")
        return value

    def request(self) -> Request:
        return self._request(self.prompt, self.max_tokens, self.logprobs, scored=self.logprobs is not None)
