"""The step loop: one thread owns the executor and advances every running request by one step at a time.

Each turn it drops who has gone, admits who fits, plans a step (`planning`), gives the rows pages (`residency`), runs it
and draws tokens. When pages run out the youngest request steps back into the queue and is computed again later: what it
has said is kept and the sampler depends on positions only, so its stream goes on as if nothing had happened. The queue
is bounded; what does not fit is refused at once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from engine.checkpoints.known_tokens import KnownTokens
from engine.executors.interface import F32, Executor, Span, Wants
from engine.runtime.answers import Answers
from engine.runtime.constraints import ConstraintError
from engine.runtime.drafting import Drafting
from engine.runtime.pages import PagePool
from engine.runtime.planning import Budget, Need, plan
from engine.runtime.residency import Residency
from engine.runtime.sampling import TokenCounts
from engine.runtime.sequences import Event, Failure, Finished, FinishReason, Listener, Request, Running, Tokens
from engine.runtime.step_cost import StepCost

log = logging.getLogger("autoglm.engine")


class QueueFull(Exception):
    """As many requests wait as may wait."""


class TooLong(Exception):
    """The request could not be served even alone: it needs more key-value pages than there are."""


class Closed(Exception):
    """The loop takes no new requests: it is draining or stopped."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of the loop."""

    max_running: int = 16
    max_waiting: int = 64
    step_rows: int = 512
    """Rows of one step at most; the executor's own bound may be lower."""
    logit_rows: int = 64
    """Rows of one step whose logits are kept, beyond one for each decoding request: scoring and drafts."""
    slowdown: float = 1.6
    """While someone decodes, a step with prefill may take this many times the step without it."""
    least_prefill_rows: int = 4
    """Rows of prefill that go in any case. Small, for where rows are dear these are what breaks the slowdown."""
    max_draft: int = 0
    """Draft tokens a request may have in one step; 0 turns speculation off."""
    draft_match: int = 3
    """Tokens that must repeat before what followed them is tried."""
    publish_blocks: int = 1
    """Blocks handed on after a step; each is a copy of a page, for which everyone waits."""


@dataclass(frozen=True, slots=True)
class Load:
    """How busy the loop is, and what it has done since its start."""

    running: int
    waiting: int
    kv_used_bytes: int
    pending_prefill_tokens: int
    generated_tokens: int
    steps: int
    kv_kept_bytes: int = 0
    preemptions: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    prefilled_tokens: int = 0


class Loop:
    """Start, submit, cancel, close. `submit` and `cancel` may be called from any thread."""

    def __init__(
        self,
        executor: Executor,
        limits: Limits,
        pages: PagePool | None = None,
        clock: Callable[[], float] = time.monotonic,
        after_turn: Callable[[], None] = lambda: None,
        known: KnownTokens | None = None,
    ) -> None:
        """`pages` has as many as the executor; `after_turn` is called on the step thread when listeners were told;
        of the vocabulary only `known` ids are drawn, None: all.
        """
        self._executor, self._limits, self._clock, self._after_turn = executor, limits, clock, after_turn
        self.pages = PagePool(executor.page_count) if pages is None else pages
        self._residency = Residency(executor, self.pages)
        self._answers = Answers(KnownTokens(executor.vocab_size) if known is None else known)
        self._drafting = Drafting(limits.max_draft, limits.draft_match)
        self._cost = StepCost()
        self._budget = Budget(
            max_rows=min(limits.step_rows, executor.max_rows),
            logit_rows=max(limits.logit_rows, limits.max_running),
            slowdown=limits.slowdown,
            least_prefill_rows=limits.least_prefill_rows,
        )
        self._waiting: deque[Running] = deque()
        self._running: list[Running] = []
        """Oldest first."""
        self._wake = threading.Condition()
        self._closed = False
        self._arrivals = self._turns = 0
        self._generated = self._steps = self._preemptions = self._prefilled = 0
        self._thread = threading.Thread(target=self._run, name="engine-step", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: Request, listener: Listener) -> Running:
        """Queues a request; the listener hears Tokens, then Finished or Failure. Raises TooLong, QueueFull, Closed."""
        sequence = Running(request, listener)
        room = self._executor.page_count * self._executor.block_tokens
        if sequence.capacity_tokens > room:
            raise TooLong(
                f"{sequence.capacity_tokens} tokens need more key-value memory than the worker has, {room} tokens"
            )
        with self._wake:
            self.check_room()
            self._arrivals += 1
            sequence.arrival = self._arrivals
            self._waiting.append(sequence)
            self._wake.notify()
        return sequence

    def check_room(self, arriving: int = 0) -> None:
        """Raises what `submit` would raise now, had `arriving` more requests been submitted already."""
        with self._wake:
            if self._closed:
                raise Closed("the worker is draining")
            running, waiting = len(self._running), len(self._waiting) + arriving
            if running + waiting >= self._limits.max_running + self._limits.max_waiting:
                raise QueueFull(f"{running} requests run and {waiting} wait, as many as may")

    def cancel(self, sequence: Running) -> None:
        """Frees the request before the next step; its listener hears nothing more than a Failure.CANCELLED."""
        sequence.cancelled = True
        with self._wake:
            self._wake.notify()

    def load(self) -> Load:
        with self._wake:
            everyone = [*self._running, *self._waiting]
            running = len(self._running)
        pending = [sequence.pending for sequence in everyone]
        return Load(
            running=running,
            waiting=len(everyone) - running,
            kv_used_bytes=self.pages.used * self._executor.page_bytes,
            pending_prefill_tokens=sum(count for count in pending if count > 1),
            generated_tokens=self._generated,
            steps=self._steps,
            kv_kept_bytes=self.pages.kept * self._executor.page_bytes,
            preemptions=self._preemptions,
            drafts=self._drafting.drafts,
            draft_tokens=self._drafting.tokens,
            accepted_tokens=self._drafting.accepted,
            prefilled_tokens=self._prefilled,
        )

    def close(self) -> None:
        """Refuses new requests; those at work go on."""
        with self._wake:
            self._closed = True
            self._wake.notify()

    def join(self, timeout_s: float | None = None) -> bool:
        """After `close`: waits until the last request is done. False when time ran out first."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._waiting or self._running or self._residency.has_unpublished):
                    if self._closed:
                        return
                    self._wake.wait()
            try:
                self._drop_the_gone()
                self._admit()
                if self._running:
                    self._step()
                self._residency.publish(self._limits.publish_blocks)
            except Exception:
                # No request may end the thread: all others would wait for ever.
                log.exception("the step loop failed; every request ends")
                self._end_all()
            try:
                self._after_turn()
            except Exception:
                log.exception("what follows a turn failed")

    # -- who is at work -----------------------------------------------------------------------------------------

    def _end_all(self) -> None:
        with self._wake:
            ended = [*self._running, *self._waiting]
            self._running.clear()
            self._waiting.clear()
        for sequence in ended:
            try:
                self._residency.release(sequence)
            except Exception:
                log.exception("pages of a request could not be given back")
            self._tell(sequence, Failure.INTERNAL)

    def _drop_the_gone(self) -> None:
        now = self._clock()
        with self._wake:
            gone = [
                sequence
                for group in (self._running, self._waiting)
                for sequence in group
                if sequence.cancelled or _is_expired(sequence, now)
            ]
        for sequence in gone:
            self._end(sequence, Failure.CANCELLED if sequence.cancelled else Failure.EXPIRED)

    def _admit(self) -> None:
        while True:
            with self._wake:
                if not self._waiting or len(self._running) >= self._limits.max_running:
                    return
                sequence = self._waiting[0]
            try:
                if self._running and self._residency.missing(sequence) > self._spare_pages():
                    return
                with self._wake:
                    self._waiting.popleft()
                    self._running.append(sequence)
                self._begin(sequence)
            except Exception:
                log.exception("a request could not begin; it ends")
                self._end(sequence, Failure.INTERNAL)

    def _spare_pages(self) -> int:
        """Pages that those at work will not need soon: each may need one more beside those of its present tokens."""
        block = self._executor.block_tokens
        owed = sum(max(0, len(each.tokens) // block + 1 - len(each.pages)) + 1 for each in self._running)
        return self.pages.available - owed

    def _begin(self, sequence: Running) -> None:
        self._residency.begin(sequence)
        if sequence.has_begun:
            return
        sequence.has_begun = True
        request = sequence.request
        sequence.cached_tokens = sequence.computed
        if request.sampling.has_penalties:
            cut = sequence.prompt_tokens
            sequence.seen = TokenCounts(sequence.tokens[:cut], sequence.tokens[cut:])
        self._drafting.begin(sequence)
        if request.prefix_blocks:
            sequence.request = replace(request, prefix_blocks={})  # not twice in memory while it runs

    def _preempt_younger(self, sequence: Running) -> bool:
        """Sends the youngest request that is younger than this one back to the front of the queue."""
        youngest = self._running[-1]
        if youngest.arrival <= sequence.arrival:
            return False
        with self._wake:
            self._running.pop()
            self._waiting.appendleft(youngest)
        self._residency.release(youngest)
        self._preemptions += 1
        return True

    # -- one step -----------------------------------------------------------------------------------------------

    def _step(self) -> None:
        planned = self._plan()
        if not planned:
            return
        decoding = prefilling = 0
        for _, span, drafts in planned:
            if len(span.token_ids) == 1 + len(drafts):
                decoding += len(span.token_ids)
            else:
                prefilling += len(span.token_ids)
        started = self._clock()
        try:
            results = self._executor.step([span for _, span, _ in planned])
        except Exception:
            log.exception("a step failed; its %d requests end", len(planned))
            for sequence, _, _ in planned:
                self._end(sequence, Failure.INTERNAL)
            return
        self._cost.observe(decoding, prefilling, self._clock() - started)
        self._steps += 1
        self._prefilled += prefilling
        for (sequence, span, drafts), logits in zip(planned, results, strict=True):
            try:
                self._advance(sequence, span, drafts, logits)
            except ConstraintError as error:
                log.warning("a constraint could not be followed: %s", error)
                self._end(sequence, Failure.CONSTRAINT)
            except Exception:
                log.exception("a token could not be made; its request ends")
                self._end(sequence, Failure.INTERNAL)

    def _plan(self) -> list[tuple[Running, Span, list[int]]]:
        """Who computes what in this step, with pages for all of it."""
        self._turns += 1
        running = list(self._running)
        decoding = sum(1 for sequence in running if sequence.pending == 1)
        drafts = [self._drafting.propose(sequence, decoding, self._cost) for sequence in running]
        needs = [
            Need(sequence.pending, len(draft), sequence.is_scoring)
            for sequence, draft in zip(running, drafts, strict=True)
        ]
        planned: list[tuple[Running, Span, list[int]]] = []
        for sequence, draft, rows in zip(
            running, drafts, plan(needs, self._cost, self._budget, self._turns), strict=True
        ):
            # Those stepped back during this planning are the youngest: at the end of `running`, so not planned yet.
            if not rows or not sequence.has_begun or sequence.arrival > self._running[-1].arrival:
                continue
            computed = sequence.computed
            room = self._residency.grow(sequence, computed + rows) - computed
            while room < 1 and self._preempt_younger(sequence):
                room = self._residency.grow(sequence, computed + rows) - computed
            rows = min(rows, room)
            if rows < 1:
                continue  # it keeps its place and waits for an older one to end
            tokens = sequence.tokens
            draft = draft[: max(0, computed + rows - len(tokens))]
            ids = tokens[computed : computed + rows] + draft
            if sequence.is_scoring:
                wants = Wants.ALL if computed + rows >= sequence.scored else Wants.NONE
            elif computed + rows < len(tokens):
                wants = Wants.NONE
            else:
                wants = Wants.ALL if draft else Wants.LAST
            planned.append((sequence, Span(ids, computed, sequence.pages, wants), draft))
        return planned

    def _advance(self, sequence: Running, span: Span, drafts: list[int], logits: F32 | None) -> None:
        start = sequence.computed
        sequence.computed += len(span.token_ids) - len(drafts)
        if sequence.is_scoring:
            self._score(sequence, start, logits)
        elif sequence.pending == 0:
            assert logits is not None
            self._generate(sequence, drafts, logits)
        else:
            self._residency.settle(sequence)
            if sequence.lookup is not None:
                sequence.lookup.advance()

    def _generate(self, sequence: Running, drafts: list[int], logits: F32) -> None:
        drawn = self._answers.draw(sequence, drafts, logits)
        self._drafting.learn(sequence, len(drafts), drawn.accepted)
        self._residency.settle(sequence)
        self._generated += len(drawn.token_ids)
        if drawn.token_ids:
            self._tell(sequence, Tokens(drawn.token_ids, drawn.logprobs, sequence.cached_prompt_tokens))
        if drawn.end is not None:
            self._finish(sequence, *drawn.end)

    def _score(self, sequence: Running, start: int, logits: F32 | None) -> None:
        told = None if logits is None else self._answers.score(sequence, start, logits)
        self._residency.settle(sequence)
        if told is not None:
            self._tell(sequence, told)
        if sequence.pending == 0:
            self._finish(sequence, FinishReason.LENGTH, None)

    def _finish(self, sequence: Running, reason: FinishReason, stop_token_id: int | None) -> None:
        self._end(
            sequence,
            Finished(
                reason=reason,
                stop_token_id=stop_token_id,
                prompt_tokens=sequence.prompt_tokens,
                cached_tokens=sequence.cached_prompt_tokens,
                completion_tokens=sequence.position,
            ),
        )

    def _end(self, sequence: Running, event: Event) -> None:
        with self._wake:
            for group in (self._running, self._waiting):
                if sequence in group:
                    group.remove(sequence)
        self._residency.release(sequence)
        self._tell(sequence, event)

    @staticmethod
    def _tell(sequence: Running, event: Event) -> None:
        try:
            sequence.listener(event)
        except Exception:
            log.exception("a listener failed; its request is cancelled")
            sequence.cancelled = True


def _is_expired(sequence: Running, now: float) -> bool:
    deadline = sequence.request.deadline
    return deadline is not None and now >= deadline
