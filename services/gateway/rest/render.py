"""Events as OpenAI-style JSON: chunks of a stream, or one whole answer. Two siblings: chat and plain completions.

Pure: ids, times and events come in, dictionaries go out.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from services.gateway.events import Alternative, Delta, Event, Finished, TokenText, Usage
from services.gateway.models import Model

Json = dict[str, Any]

DONE = b"data: [DONE]\n\n"


def encode(body: Json) -> bytes:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()


def sse(body: Json) -> bytes:
    """One server-sent event. JSON holds no raw line break, so one data line always suffices."""
    return b"data: " + encode(body) + b"\n\n"


class Renderer(ABC):
    """Renders one answer; a new one is made for each request, for it remembers which choices have begun."""

    prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, request_id: str, model: str, created: int, *, scored: bool, include_usage: bool) -> None:
        self._head = {"id": f"{self.prefix}-{request_id.removeprefix('req-')}", "created": created, "model": model}
        self._scored, self._include_usage = scored, include_usage
        self._begun: set[int] = set()

    def chunks(self, event: Event) -> list[Json]:
        """The stream's chunks for `event`; often one, sometimes none."""
        match event:
            case Delta():
                if not event.text and not self._scored:
                    return []
                logprobs = self._logprobs(event.tokens)
                opening = self._open(event)
                return [*opening, self._chunk(event, [self._piece(event.choice, event.text, logprobs, None)])]
            case Finished():
                opening = self._open(event)
                return [*opening, self._chunk(event, [self._piece(event.choice, None, None, event.reason)])]
            case Usage():
                return [self._chunk(event, []) | {"usage": usage(event)}] if self._include_usage else []

    def whole(self, events: Iterable[Event]) -> Json:
        """The answer that a complete series of events makes."""
        texts: dict[int, list[str]] = {}
        tokens: dict[int, list[TokenText]] = {}
        ends: dict[int, Finished] = {}
        counts: Json = {}
        digest = ""
        for event in events:
            digest = event.variant_digest
            match event:
                case Delta():
                    texts.setdefault(event.choice, []).append(event.text)
                    tokens.setdefault(event.choice, []).extend(event.tokens)
                case Finished():
                    ends[event.choice] = event
                case Usage():
                    counts = usage(event)
        choices = [
            self._complete(n, "".join(texts.get(n, ())), self._logprobs(tokens.get(n, ())), ends[n].reason)
            for n in sorted(ends)
        ]
        return self._head | {
            "object": self.whole_object,
            "system_fingerprint": digest,
            "choices": choices,
            "usage": counts,
        }

    def _open(self, event: Delta | Finished) -> list[Json]:
        if event.choice in self._begun:
            return []
        self._begun.add(event.choice)
        opening = self._opening(event.choice)
        return [] if opening is None else [self._chunk(event, [opening])]

    def _chunk(self, event: Event, choices: list[Json]) -> Json:
        chunk = self._head | {
            "object": self.chunk_object,
            "system_fingerprint": event.variant_digest,
            "choices": choices,
        }
        return chunk | {"usage": None} if self._include_usage else chunk

    def _logprobs(self, tokens: Sequence[TokenText]) -> Json | None:
        return self._scores(tokens) if self._scored else None

    @abstractmethod
    def _opening(self, choice: int) -> Json | None:
        """What a choice's first chunk says before any text."""

    @abstractmethod
    def _piece(self, choice: int, text: str | None, logprobs: Json | None, reason: str | None) -> Json:
        """A choice's part of a chunk; text None at its end."""

    @abstractmethod
    def _complete(self, choice: int, text: str, logprobs: Json | None, reason: str) -> Json:
        """A choice of a whole answer."""

    @abstractmethod
    def _scores(self, tokens: Sequence[TokenText]) -> Json:
        """Log-probabilities."""


class ChatRenderer(Renderer):
    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _opening(self, choice: int) -> Json:
        delta = {"role": "assistant", "content": ""}
        return {"index": choice, "delta": delta, "logprobs": None, "finish_reason": None}

    def _piece(self, choice: int, text: str | None, logprobs: Json | None, reason: str | None) -> Json:
        delta = {} if text is None else {"content": text}
        return {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _complete(self, choice: int, text: str, logprobs: Json | None, reason: str) -> Json:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": choice, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def _scores(self, tokens: Sequence[TokenText]) -> Json:
        entries = [_entry(token) | {"top_logprobs": [_entry(other) for other in token.top]} for token in tokens]
        return {"content": entries, "refusal": None}


class TextRenderer(Renderer):
    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def _opening(self, choice: int) -> None:
        return None

    def _piece(self, choice: int, text: str | None, logprobs: Json | None, reason: str | None) -> Json:
        return {"index": choice, "text": text or "", "logprobs": logprobs, "finish_reason": reason}

    def _complete(self, choice: int, text: str, logprobs: Json | None, reason: str) -> Json:
        return {"index": choice, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _scores(self, tokens: Sequence[TokenText]) -> Json:
        return {
            "tokens": [_spelled(token.content) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [_top(token) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }


def usage(counts: Usage) -> Json:
    return {
        "prompt_tokens": counts.prompt_tokens,
        "completion_tokens": counts.completion_tokens,
        "total_tokens": counts.prompt_tokens + counts.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": counts.cached_tokens},
    }


def model_card(model: Model) -> Json:
    """An entry of /v1/models; the last two are beyond what OpenAI tells."""
    return {
        "id": model.name,
        "object": "model",
        "created": model.created_unix_s,
        "owned_by": "autoglm",
        "max_model_len": model.context_tokens,
        "variant_digest": model.variant_digest,
    }


def _entry(token: TokenText | Alternative) -> Json:
    text = token.content.decode(errors="replace")
    return {"token": text, "logprob": token.logprob, "bytes": list(token.content)}


def _top(token: TokenText) -> Json:
    """The alternatives, best first; the older API always names the chosen token too, however unlikely it was."""
    top = {_spelled(other.content): other.logprob for other in token.top}
    return {**top, _spelled(token.content): token.logprob}


def _spelled(content: bytes) -> str:
    """A token as a string; one that holds part of a character is spelled in bytes, so that different ones differ."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)
