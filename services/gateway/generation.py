"""One generation's life: prompt to ids, one worker stream per choice, ids to text up to a stop string, the counts.

`server.py` and `rest/` start a `Generation` and read its events; it knows neither protobuf nor HTTP. All work runs in
one task of its own under the caller's deadline, so that a slow or vanished client holds no worker: closing the
generation, or its deadline, ends every stream at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self, assert_never

from opentelemetry import trace

from services.chassis import deadlines
from services.chassis.decoding import Spelling, TextDecoder, unknown_id
from services.chassis.errors import Internal, InvalidRequest, OutOfTime
from services.gateway.budgets.bucket import Standing
from services.gateway.budgets.reservations import Budgets, Reservation
from services.gateway.clients import Tokenizer, Workers
from services.gateway.events import Alternative, Delta, Event, Finished, TokenText, Usage
from services.gateway.limits import Admission, check, prompt_field, tokens_to_generate
from services.gateway.metering import Meter
from services.gateway.models import Catalogue, Model, check_tokenizer
from services.gateway.observation import Observation
from services.gateway.requests import Chat, Ids, Prompt, Request, Text
from services.gateway.settings import Settings
from services.gateway.stops import Transcript
from services.gateway.work import Encoded, End, Tokens, Work

_TRACER = trace.get_tracer("autoglm.gateway")  # a proxy until telemetry starts


@dataclass(frozen=True, slots=True)
class Gateway:
    """What every generation uses. `new_seed` gives a number in 0 … 2^63-1 for callers that chose none."""

    settings: Settings
    tokenizer: Tokenizer
    workers: Workers
    catalogue: Catalogue
    admission: Admission
    budgets: Budgets
    new_seed: Callable[[], int]

    def generate(self, request: Request, request_id: str, tenant: str) -> Generation:
        """Starts a generation, or raises InvalidRequest or TooBusy before any work is done."""
        check(request, self.settings)
        return Generation(self, request, request_id, tenant, self.admission.admit(request.all_choices))

    async def encode(self, model: Model, prompt: Prompt) -> Encoded:
        """The prompt as ids of the model's own tokenizer; fails closed when another tokenizer answers."""
        match prompt:
            case Text(text):
                encoded = await self.tokenizer.encode(model.name, text, self.settings.parse_special_tokens)
            case Chat(messages):
                encoded = await self.tokenizer.render(model.name, messages)
            case Ids(token_ids):
                return Encoded(token_ids, model.tokenizer_digest)
            case _:
                assert_never(prompt)
        check_tokenizer(model, encoded.tokenizer_digest)
        return encoded


@dataclass(frozen=True, slots=True)
class _Ending:
    """The last thing in the queue: how the work ended."""

    failure: Exception | None


class Generation:
    """Events of one request, in order, ending after Usage or with an exception. Leaving its block ends its work."""

    def __init__(
        self, gateway: Gateway, request: Request, request_id: str, tenant: str, release: Callable[[], None]
    ) -> None:
        if deadlines.remaining_s() is None:
            deadlines.start(gateway.settings.default_deadline_s)
        self._gateway, self._request, self._request_id, self._tenant = gateway, request, request_id, tenant
        self._release = release
        self._reservation: Reservation | None = None
        self._meter = Meter((), request.choices)
        self._events: asyncio.Queue[Event | _Ending] = asyncio.Queue(gateway.settings.queue_events)
        self._seen = Observation(request, request_id)
        self._task = asyncio.create_task(self._run(), name=request_id)
        self._task.add_done_callback(self._clean_up)

    @property
    def standing(self) -> Standing | None:
        """How the tenant stood when this request was admitted; None before that, or when it has no budget."""
        return self._reservation.standing if self._reservation is not None else None

    def close(self) -> None:
        """Ends all work now. May be called from anywhere, more than once."""
        self._task.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        await asyncio.wait([self._task])

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        item = await self._events.get()
        if not isinstance(item, _Ending):
            return item
        self._events.put_nowait(item)  # there is room: the ending is the last item
        if item.failure is not None:
            raise item.failure
        raise StopAsyncIteration

    async def _run(self) -> None:
        failure: Exception | None = None
        try:
            with trace.use_span(self._seen.span, record_exception=False, set_status_on_exception=False):
                async with asyncio.timeout(deadlines.remaining_s()):
                    await self._serve()
        except TimeoutError:
            failure = OutOfTime("the deadline passed before the answer was complete")
        except ExceptionGroup as group:
            failure = _first(group)
        except Exception as error:
            failure = error
        self._settle(has_left=False)
        self._release()  # before the queue, which a client that does not read may keep full
        self._seen.end(failure)
        await self._events.put(_Ending(failure))

    def _settle(self, *, has_left: bool) -> None:
        if self._reservation is not None:
            self._reservation.settle(self._meter.used(has_left=has_left))

    def _clean_up(self, task: asyncio.Task[None]) -> None:
        self._settle(has_left=True)
        self._release()
        if task.cancelled():
            self._seen.end(asyncio.CancelledError())
            if not self._events.full():
                self._events.put_nowait(_Ending(None))  # for a reader that waits while someone else closes

    async def _serve(self) -> None:
        gateway, request = self._gateway, self._request
        # Whoever has nothing left is refused before anything is asked of anyone: each choice takes a token at least.
        least = request.all_choices * max(1, request.max_tokens) + len(request.prompts)
        await gateway.budgets.look(self._tenant, least)
        model = await gateway.catalogue.get(request.model)
        seed = gateway.new_seed() if request.sampling.seed is None else request.sampling.seed
        self._seen.is_for(model.name, seed)
        with _TRACER.start_as_current_span("tokenize"):
            prompts = [(await gateway.encode(model, prompt)).token_ids for prompt in request.prompts]
            spelling = await gateway.tokenizer.spelling(model)
        if not all(prompts):
            raise InvalidRequest("the prompt is empty", field=prompt_field(request))
        wanted = [tokens_to_generate(request, len(ids), model, gateway.settings.default_max_tokens) for ids in prompts]
        lengths = [len(ids) for ids in prompts]
        self._meter = Meter(lengths, request.choices)
        self._reservation = await gateway.budgets.reserve(self._tenant, sum(lengths) + request.choices * sum(wanted))
        sampling = replace(request.sampling, seed=seed)
        async with asyncio.TaskGroup() as group:
            choices = [
                group.create_task(
                    self._choose(
                        spelling,
                        number * request.choices + index,
                        Work(
                            request_id=f"{self._request_id}-{number * request.choices + index}",
                            model=model.name,
                            token_ids=ids,
                            sampling=sampling,
                            max_tokens=wanted[number],
                            choice_index=index,
                            tenant=self._tenant,
                            ignore_eos=request.ignore_eos,
                            logprobs=request.logprobs,
                            top_logprobs=request.top_logprobs,
                            min_tokens=request.min_tokens,
                            constraint=request.constraint,
                        ),
                    )
                )
                for number, ids in enumerate(prompts)
                for index in range(request.choices)
            ]
        ends = [choice.result() for choice in choices]
        # Each prompt counts once, and as cached what the best served of its choices found cached.
        cached = [
            max(end.cached_tokens for end in ends[start : start + request.choices])
            for start in range(0, len(ends), request.choices)
        ]
        total = sum(end.completion_tokens for end in ends)
        self._settle(has_left=False)  # a caller who has seen the counts finds them in the budget
        await self._tell(Usage(ends[0].variant_digest, sum(lengths), sum(cached), total))

    async def _choose(self, spelling: Spelling, choice: int, work: Work) -> End:
        """One choice from its worker stream to its Finished event."""
        transcript, decoder = Transcript(self._request.stop), TextDecoder(spelling, keep_special=False)
        token_by_token = bool(self._request.stop) or self._request.logprobs
        received = 0
        self._meter.asked(choice)
        with _TRACER.start_as_current_span("stream", attributes={"autoglm.choice": choice}) as span:
            async with aclosing(self._gateway.workers.generate(work)) as parts:
                async for part in parts:
                    digest = part.variant_digest
                    shown: list[tuple[str, tuple[TokenText, ...]]] = []
                    if isinstance(part, Tokens):
                        self._meter.received(choice, received + len(part.token_ids))
                        groups = [(token_id,) for token_id in part.token_ids] if token_by_token else [part.token_ids]
                        tokens = self._tokens(spelling, part)
                        for group in groups:
                            behind, tokens = tokens[: len(group)], tokens[len(group) :]
                            shown.append(transcript.add(decoder.push(group), behind))
                            received += len(group)
                            if transcript.matched is not None:
                                break
                    else:
                        shown = [transcript.add(decoder.finish(), ()), transcript.end()]
                    text = "".join(some for some, _ in shown)
                    made = tuple(token for _, tokens_shown in shown for token in tokens_shown)
                    if text or made:
                        await self._tell(Delta(digest, choice, text, made))
                    if transcript.matched is not None:
                        counted = part.completion_tokens if isinstance(part, End) else received
                        part = End(digest, "stop", part.cached_tokens, counted)
                    if isinstance(part, End):
                        self._meter.received(choice, part.completion_tokens)
                        span.set_attribute("gen_ai.usage.output_tokens", part.completion_tokens)
                        await self._tell(Finished(digest, choice, part.reason, transcript.matched or ""))
                        return part
        raise AssertionError("a worker stream ends with End or raises")

    def _tokens(self, spelling: Spelling, part: Tokens) -> list[TokenText]:
        """The part's tokens with their bytes, and with scores when those were asked for."""
        if not self._request.logprobs:
            return [TokenText(token_id, content) for token_id, content in _spelled(spelling, part.token_ids)]
        return [
            TokenText(
                token_id,
                content,
                score.logprob,
                tuple(
                    Alternative(other, content, value)
                    for (other, content), (_, value) in zip(
                        _spelled(spelling, [other for other, _ in score.top]), score.top, strict=True
                    )
                ),
            )
            for (token_id, content), score in zip(_spelled(spelling, part.token_ids), part.scores, strict=True)
        ]

    async def _tell(self, event: Event) -> None:
        self._seen.event(event)
        await self._events.put(event)


def _spelled(spelling: Spelling, token_ids: Sequence[int]) -> list[tuple[int, bytes]]:
    """Each token with its bytes."""
    if (unknown := unknown_id(spelling, token_ids)) is not None:
        raise Internal(f"the worker sent token {unknown}, which the tokenizer does not have", token_id=unknown)
    return [(token_id, spelling.pieces[token_id] or b"") for token_id in token_ids]


def _first(group: ExceptionGroup[Exception]) -> Exception:
    inner = group.exceptions[0]
    return _first(inner) if isinstance(inner, ExceptionGroup) else inner
