"""What the gateway answers with, as plain frozen data: completions, tokens, models, counts, health.

Nothing here knows gRPC or protobuf; `autoglm.wire` makes these from messages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

FinishReason: TypeAlias = Literal["stop", "length", "other"]
"""`stop`: an end token or stop string was met. `length`: max_tokens or the context was reached. `other`: newer."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation: `Message("user", "Hello")`. Roles: system, user, assistant, tool, developer."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Alternative:
    """A token that could have stood in a position, with the natural log of its probability."""

    token_id: int
    content: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token. `content` is its bytes and may be part of a character."""

    token_id: int
    content: bytes
    logprob: float | None = None
    top: tuple[Alternative, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of all choices of one request together; `cached_tokens` is the cached share of the prompt."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer. `finish_reason` is None while it is incomplete, which only a `partial` of an error can be."""

    index: int
    text: str
    finish_reason: FinishReason | None
    stop: str | None = None
    """The stop string that was met, if one was."""
    tokens: tuple[Token, ...] = ()
    """The tokens as the gateway reports them; their log-probabilities only when `logprobs` was asked for."""


@dataclass(frozen=True, slots=True)
class Completion:
    """The whole answer to one request."""

    choices: tuple[Choice, ...]
    usage: Usage
    model: str
    request_id: str
    """Names the request in traces and decision records; quote it when asking why something happened."""
    trace_id: str
    variant_digest: str
    """Digest of the exact variant (weights, sparsity, precision, tokenizer, template) that answered first."""

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return self.choices[0].text

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the first choice ended."""
        return self.choices[0].finish_reason


@dataclass(frozen=True, slots=True)
class Model:
    """A model that can be asked for."""

    name: str
    variant_digest: str
    context_tokens: int
    parameters: int
    created_unix_s: int


@dataclass(frozen=True, slots=True)
class TokenCount:
    """How many tokens a prompt takes, and the digest of the tokenizer that counted."""

    tokens: int
    tokenizer_digest: str


@dataclass(frozen=True, slots=True)
class Health:
    """What the gateway says about itself, and the round trip it took to say so (first connection included)."""

    status: Literal["unknown", "serving", "not_serving", "service_unknown"]
    latency_s: float

    @property
    def is_serving(self) -> bool:
        """True when requests are welcome."""
        return self.status == "serving"
