"""What the gateway refuses before any work is done: too much at once, too long a prompt, too many tokens.

Ranges of single fields are declared in the protos and in `rest/schemas.py`; here are the limits that need two facts.
"""

from __future__ import annotations

from collections.abc import Callable

from services.chassis.errors import InvalidRequest, TooBusy
from services.gateway.models import Model
from services.gateway.requests import Chat, Ids, Request, Text
from services.gateway.settings import Settings


class Admission:
    """Bounds the choices generated at once. `admit` never waits: the queue is the scheduler's."""

    def __init__(self, capacity: int, retry_after_s: float) -> None:
        self.capacity, self._retry_after_s = capacity, retry_after_s
        self.in_flight = 0

    def admit(self, choices: int) -> Callable[[], None]:
        """Takes room for `choices`, or raises TooBusy. The returned function gives it back, once."""
        wanted = min(choices, self.capacity)  # a request larger than the gateway is served alone rather than never
        if self.in_flight + wanted > self.capacity:
            raise TooBusy(
                f"{self.in_flight} generations are in flight and at most {self.capacity} are allowed",
                retry_after_s=self._retry_after_s,
                limit=self.capacity,
                kind="gateway_full",
            )
        self.in_flight += wanted
        held = [wanted]

        def release() -> None:
            if held:
                self.in_flight -= held.pop()

        return release


def check(request: Request, settings: Settings) -> None:
    """Raises InvalidRequest for a request that no model could serve."""
    if not request.prompts:
        raise InvalidRequest("the request has no prompt", field="prompt")
    if len(request.prompts) > settings.max_prompts:
        raise InvalidRequest(
            f"{len(request.prompts)} prompts, at most {settings.max_prompts} are allowed in one request", field="prompt"
        )
    size = sum(_text_bytes(request))
    if size > settings.max_prompt_bytes:
        raise InvalidRequest(
            f"the prompt has {size} bytes of text, at most {settings.max_prompt_bytes} are allowed",
            field=prompt_field(request),
            limit=settings.max_prompt_bytes,
        )
    if request.top_logprobs and not request.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true", field="top_logprobs")


def tokens_to_generate(request: Request, prompt_tokens: int, model: Model, default: int) -> int:
    """How many tokens a choice may take, or InvalidRequest when prompt and answer cannot fit the model's context."""
    left = model.context_tokens - prompt_tokens
    if left < 1:
        raise InvalidRequest(
            f"the prompt is {prompt_tokens} tokens long, but the context of {model.name} is {model.context_tokens}"
            " tokens and must leave room for at least one more; shorten the prompt",
            field=prompt_field(request),
            kind="context_length_exceeded",
            prompt_tokens=prompt_tokens,
            context_tokens=model.context_tokens,
        )
    if request.max_tokens > left:
        raise InvalidRequest(
            f"the prompt is {prompt_tokens} tokens long and max_tokens is {request.max_tokens}, together more than the"
            f" context of {model.name}, {model.context_tokens} tokens; ask for at most {left}",
            field="max_tokens",
            kind="context_length_exceeded",
            prompt_tokens=prompt_tokens,
            context_tokens=model.context_tokens,
        )
    wanted = request.max_tokens or min(default, left)
    if request.min_tokens > wanted:
        raise InvalidRequest(
            f"min_tokens is {request.min_tokens}, but the answer may have {wanted} tokens at most", field="min_tokens"
        )
    return wanted


def prompt_field(request: Request) -> str:
    """What the caller calls the prompt."""
    return "messages" if request.operation == "chat" else "prompt"


def _text_bytes(request: Request) -> list[int]:
    sizes: list[int] = []
    for prompt in request.prompts:
        match prompt:
            case Text(text):
                sizes.append(len(text.encode()))
            case Chat(messages):
                sizes.extend(len(message.content.encode()) for message in messages)
            case Ids():
                pass
    return sizes
