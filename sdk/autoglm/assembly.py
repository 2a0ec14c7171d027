"""Puts the messages of one stream together and decides whether it really ended.

Both kinds of stream feed it; it knows neither sockets nor time. A stream is complete when every choice has finished
and the usage has come; anything less is an interruption, never a short answer.
"""

from __future__ import annotations

from collections.abc import Mapping

from autoglm import wire
from autoglm.completion import Choice, Completion, FinishReason, Token, Usage
from autoglm.errors import AutoglmError, InternalError, InterruptedStreamError
from autoglm.events import Delta, Done, Finish
from autoglm.gateway.v1 import gateway_pb2
from autoglm.type.v1 import generation_pb2

_UNFINISHED = (generation_pb2.FINISH_REASON_UNSPECIFIED, generation_pb2.FINISH_REASON_HANDED_OVER)
_REASONS: Mapping[int, FinishReason] = {
    generation_pb2.FINISH_REASON_STOP: "stop",
    generation_pb2.FINISH_REASON_LENGTH: "length",
}


class Assembly:
    """One answer in the making. Feed `take` every message, then ask `done`."""

    def __init__(self, choices: int, max_bytes: int) -> None:
        self.request_id = ""
        self.trace_id = ""
        self.variant_digest = ""
        self.has_begun = False
        self._expected = max(choices, 1)
        self._texts: dict[int, list[str]] = {}
        self._tokens: dict[int, list[Token]] = {}
        self._finishes: dict[int, Finish] = {}
        self._usage: Usage | None = None
        self._bytes_left = max_bytes

    def note(self, metadata: Mapping[str, str]) -> None:
        """Learns the ids the gateway sends beside the messages."""
        self.trace_id = metadata.get("x-trace-id") or self.trace_id
        self.request_id = metadata.get("x-request-id") or self.request_id

    def take(self, response: gateway_pb2.GenerateResponse) -> Delta | Finish | None:
        """The event of one message; None when it carries none. Raises when the gateway breaks its own contract."""
        self.request_id = response.request_id or self.request_id
        self.variant_digest = self.variant_digest or response.variant_digest
        self._bytes_left -= response.ByteSize()
        if self._bytes_left < 0:
            raise InterruptedStreamError("the answer is larger than the client's max_answer_bytes allows")
        kind = response.WhichOneof("event")
        if kind == "delta":
            return self._delta(response.delta)
        if kind == "finish":
            return self._finish(response.finish)
        if kind == "usage":
            self._usage = wire.usage_of(response.usage)
        return None

    def done(self) -> Done:
        """The last event, once the call has ended without an error. Raises `InterruptedStreamError` if it is cut."""
        unfinished = self._expected - len(self._finishes)
        missing = [f"the finish of {unfinished} of {self._expected} choices"] if unfinished else []
        missing += ["the usage"] if self._usage is None else []
        if missing or self._usage is None:
            raise InterruptedStreamError(f"the stream ended without {' and '.join(missing)}")
        return Done(self._usage, self.request_id, self.trace_id, self.variant_digest)

    def choices(self) -> tuple[Choice, ...]:
        """What has arrived so far: the choices that have begun, in order."""
        made: list[Choice] = []
        for index in sorted(self._texts.keys() | self._finishes.keys()):
            finish = self._finishes.get(index)
            made.append(
                Choice(
                    index,
                    "".join(self._texts.get(index, ())),
                    finish.reason if finish else None,
                    finish.stop if finish else None,
                    tuple(self._tokens.get(index, ())),
                )
            )
        return tuple(made)

    def completion(self, model: str, done: Done) -> Completion:
        """The whole answer."""
        return Completion(self.choices(), done.usage, model, self.request_id, self.trace_id, self.variant_digest)

    def explain(self, error: AutoglmError) -> AutoglmError:
        """The same error, now with what had arrived and the ids known here."""
        error.partial = self.choices()
        error.request_id = error.request_id or self.request_id
        error.trace_id = error.trace_id or self.trace_id
        return error

    def _delta(self, delta: gateway_pb2.TextDelta) -> Delta:
        self._check_open(delta.choice)
        tokens = tuple(wire.token_of(token) for token in delta.tokens)
        self.has_begun = True
        self._texts.setdefault(delta.choice, []).append(delta.text)
        self._tokens.setdefault(delta.choice, []).extend(tokens)
        return Delta(delta.text, delta.choice, tokens)

    def _finish(self, finish: gateway_pb2.ChoiceFinish) -> Finish:
        self._check_open(finish.choice)
        if finish.reason in _UNFINISHED:
            raise InterruptedStreamError(f"choice {finish.choice} ended without a final reason")
        self.has_begun = True
        event = Finish(_REASONS.get(finish.reason, "other"), finish.choice, finish.stop or None)
        self._finishes[finish.choice] = event
        return event

    def _check_open(self, choice: int) -> None:
        if choice >= self._expected:
            raise InternalError(f"the gateway sent choice {choice}, but {self._expected} were asked for")
        if choice in self._finishes:
            raise InternalError(f"the gateway sent more of choice {choice} after its finish")
