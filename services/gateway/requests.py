"""What a caller asks for, in the words of the gateway's core: plain data that knows neither protobuf nor JSON.

`server.py` makes these from gRPC messages, `rest/schemas.py` from JSON; `generation.py` serves them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

Operation = Literal["chat", "text_completion"]
Kind = Literal["json_schema", "regex", "grammar"]


@dataclass(frozen=True, slots=True)
class Text:
    """A text to continue."""

    text: str


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation."""

    role: str
    content: str
    name: str = ""


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation to answer."""

    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Ids:
    """A prompt in the model's own token ids."""

    token_ids: tuple[int, ...]


Prompt: TypeAlias = Text | Chat | Ids


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. None means the default that the contract names."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Constraint:
    """What an answer must be: JSON of a schema (empty: any object), a regular expression, or a grammar."""

    kind: Kind
    text: str


@dataclass(frozen=True, slots=True)
class Request:
    """One call for text: each prompt is answered `choices` times.

    Choices are numbered across prompts: choice k of prompt p is p × choices + k.
    """

    model: str
    prompts: tuple[Prompt, ...]
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = 0  # 0: the gateway's default, at most what fits
    stop: tuple[str, ...] = ()
    choices: int = 1
    logprobs: bool = False
    top_logprobs: int = 0
    ignore_eos: bool = False
    min_tokens: int = 0
    constraint: Constraint | None = None

    @property
    def operation(self) -> Operation:
        return "chat" if self.prompts and isinstance(self.prompts[0], Chat) else "text_completion"

    @property
    def all_choices(self) -> int:
        return len(self.prompts) * self.choices
