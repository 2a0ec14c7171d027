"""The step loop: one thread owns the executor and advances every running request by one step at a time.

A step takes one row from each decoding request and fills the rest of its budget with prefill, block by block, so a
long prompt never stalls the others for more than a step. A cancelled request leaves before the next step. The queue
and the key-value memory are bounded; what does not fit is refused at once with `QueueFull`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass, replace

from engine.executors.interface import F32, Executor, Span
from engine.runtime.sampling import draw, is_sound, logprobs_of
from engine.runtime.sequences import Event, Failure, Finished, FinishReason, Listener, Request, Running, Tokens

log = logging.getLogger("autoglm.engine")


class QueueFull(Exception):
    """As many requests wait as may wait."""


class Closed(Exception):
    """The loop takes no new requests: it is draining or stopped."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of the loop."""

    max_running: int = 16
    max_waiting: int = 64
    kv_capacity_bytes: int = 256 << 20
    step_rows: int = 64
    """Rows of one step: decoding requests first, prefill fills up, but one block of prefill at least."""


@dataclass(frozen=True, slots=True)
class Load:
    """How busy the loop is."""

    running: int
    waiting: int
    kv_used_bytes: int
    pending_prefill_tokens: int
    generated_tokens: int
    steps: int


class Loop:
    """Start, submit, cancel, close. `submit` and `cancel` may be called from any thread."""

    def __init__(
        self,
        executor: Executor,
        kv_bytes_per_token: int,
        limits: Limits,
    ) -> None:
        self._executor, self._limits = executor, limits
        self._kv_bytes_per_token = kv_bytes_per_token
        self._waiting: deque[Running] = deque()
        self._running: list[Running] = []
        self._wake = threading.Condition()
        self._closed = False
        self._generated = 0
        self._steps = 0
        self._thread = threading.Thread(target=self._run, name="engine-step", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: Request, listener: Listener) -> Running:
        """Queues a request. Raises QueueFull or Closed. The listener hears Tokens and then one Finished or Failure."""
        sequence = Running(request, listener)
        if sequence.capacity_tokens * self._kv_bytes_per_token > self._limits.kv_capacity_bytes:
            raise QueueFull("the request alone needs more key-value memory than the worker has")
        with self._wake:
            self.check_room()
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
            running, waiting = list(self._running), list(self._waiting)
        pending = sum(max(0, len(s.request.token_ids) - s.prefilled) for s in (*running, *waiting))
        return Load(
            running=len(running),
            waiting=len(waiting),
            kv_used_bytes=self._reserved(running),
            pending_prefill_tokens=pending,
            generated_tokens=self._generated,
            steps=self._steps,
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

    def _reserved(self, running: list[Running]) -> int:
        return sum(s.capacity_tokens for s in running) * self._kv_bytes_per_token

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._waiting and not self._running:
                    if self._closed:
                        return
                    self._wake.wait()
            try:
                self._drop_the_gone()
                self._admit()
                if self._running:
                    self._step()
            except Exception:
                # No request may end the thread: all others would wait for ever.
                log.exception("the step loop failed; every request ends")
                self._end_all()

    def _end_all(self) -> None:
        with self._wake:
            ended = [*self._running, *self._waiting]
            self._running.clear()
            self._waiting.clear()
        for sequence in ended:
            self._tell(sequence, Failure.INTERNAL)

    def _drop_the_gone(self) -> None:
        now = time.monotonic()
        with self._wake:
            for group in (self._running, self._waiting):
                for sequence in [s for s in group if s.cancelled or self._is_expired(s, now)]:
                    group.remove(sequence)
                    self._tell(sequence, Failure.CANCELLED if sequence.cancelled else Failure.EXPIRED)

    @staticmethod
    def _is_expired(sequence: Running, now: float) -> bool:
        deadline = sequence.request.deadline
        return deadline is not None and now >= deadline

    def _admit(self) -> None:
        with self._wake:
            used = self._reserved(self._running)
            while self._waiting and len(self._running) < self._limits.max_running:
                needed = self._waiting[0].capacity_tokens * self._kv_bytes_per_token
                if used + needed > self._limits.kv_capacity_bytes:
                    break
                used += needed
                self._running.append(self._waiting.popleft())
        for sequence in [s for s in self._running if s.cache is None]:
            try:
                self._begin(sequence)
            except Exception:
                log.exception("a request could not begin; it ends")
                self._end(sequence, Failure.INTERNAL)

    def _begin(self, sequence: Running) -> None:
        cache = self._executor.new_cache(sequence.capacity_tokens)
        for payload in sequence.request.prefix_blocks:
            try:
                cache.import_block(payload)
            except ValueError as error:
                log.warning("a cached block was unusable and is recomputed: %s", error)
                break
        sequence.request = replace(sequence.request, prefix_blocks=())  # not twice in memory while it runs
        sequence.cache = cache
        sequence.cached_tokens = sequence.prefilled = cache.length
        if sequence.request.block_names is not None:
            sequence.names = sequence.request.block_names(sequence.request.token_ids)
        sequence.published = cache.length // self._executor.block_tokens

    def _step(self) -> None:
        plan = self._plan()
        try:
            results = self._executor.step([span for _, span in plan])
        except Exception:
            planned = {id(sequence): sequence for sequence, _ in plan}
            log.exception("a step failed; its %d requests end", len(planned))
            for sequence in planned.values():
                self._end(sequence, Failure.INTERNAL)
            return
        self._steps += 1
        touched: dict[int, Running] = {}
        failed: set[int] = set()
        for (sequence, span), logits in zip(plan, results, strict=True):
            if id(sequence) in failed:
                continue
            touched[id(sequence)] = sequence
            try:
                if logits is not None and not is_sound(logits):
                    raise FloatingPointError("the model's logits are not finite")
                self._advance(sequence, span, logits)
            except Exception:
                log.exception("a token could not be made; its request ends")
                failed.add(id(sequence))
                self._end(sequence, Failure.INTERNAL)
        for key, sequence in touched.items():
            if key not in failed:
                self._publish(sequence)

    def _plan(self) -> list[tuple[Running, Span]]:
        """Decoding requests first, one row each; then prefill, oldest first, in aligned blocks up to the budget."""
        plan: list[tuple[Running, Span]] = []
        rows = 0
        for sequence in self._running:
            if sequence.is_decoding:
                assert sequence.cache is not None
                plan.append((sequence, Span(sequence.cache, sequence.output[-1:], True)))
                rows += 1
        block = self._executor.block_tokens
        decoding = len(plan)
        for sequence in self._running:
            if sequence.is_decoding:
                continue
            assert sequence.cache is not None
            scoring = sequence.request.score_from is not None
            prompt, start = sequence.request.token_ids, sequence.prefilled
            while start < len(prompt):
                ids = prompt[start : start + block - start % block]
                # The first block always goes: enough decoding requests would otherwise shut new ones out.
                if len(plan) > decoding and rows + len(ids) > self._limits.step_rows:
                    return plan
                start += len(ids)
                plan.append((sequence, Span(sequence.cache, ids, scoring or start == len(prompt))))
                rows += len(ids)
        return plan

    def _advance(self, sequence: Running, span: Span, logits: F32 | None) -> None:
        was_decoding = sequence.is_decoding
        if not was_decoding:
            start = sequence.prefilled
            sequence.prefilled += len(span.token_ids)
            if sequence.request.score_from is not None:
                assert logits is not None
                self._score(sequence, start, logits)
                return
            if not sequence.is_decoding:
                return
        assert logits is not None
        self._generate(sequence, logits[-1])

    def _generate(self, sequence: Running, logits: F32) -> None:
        request = sequence.request
        if sequence.produced >= request.max_tokens:
            self._finish(sequence, FinishReason.LENGTH, None)
            return
        token = draw(logits, request.sampling, sequence.prompt, sequence.output)
        if token in request.end_token_ids or token in request.stop_token_ids:
            self._finish(sequence, FinishReason.STOP, token)
            return
        scores = (logprobs_of(logits, token, request.top_logprobs),) if request.logprobs else ()
        sequence.output.append(token)
        self._generated += 1
        self._tell(sequence, Tokens((token,), scores, sequence.cached_prompt_tokens))
        if sequence.produced >= request.max_tokens:
            self._finish(sequence, FinishReason.LENGTH, None)

    def _score(self, sequence: Running, start: int, logits: F32) -> None:
        """Row i of `logits` predicts the token at start + i + 1."""
        request = sequence.request
        assert request.score_from is not None
        ids, scores = [], []
        for row, position in enumerate(range(start + 1, start + 1 + len(logits))):
            if request.score_from <= position < len(request.token_ids):
                ids.append(request.token_ids[position])
                scores.append(logprobs_of(logits[row], ids[-1], request.top_logprobs))
        if ids:
            self._tell(sequence, Tokens(tuple(ids), tuple(scores)))
        if sequence.is_decoding:
            self._finish(sequence, FinishReason.LENGTH, None)

    def _publish(self, sequence: Running) -> None:
        request, cache = sequence.request, sequence.cache
        if not sequence.publishes or request.block_names is None or cache is None:
            return
        whole = cache.length // self._executor.block_tokens
        if whole == sequence.published:
            return
        try:
            if whole > len(sequence.names):
                tokens = [*sequence.prompt, *sequence.output]
                sequence.names = request.block_names(tokens[: cache.length])
            for index in range(sequence.published, whole):
                request.on_block(sequence.names[index], cache.export_block(index))
        except Exception:
            log.exception("a block could not be handed on; the request goes on and keeps the rest to itself")
            sequence.publishes = False
        sequence.published = whole

    def _finish(self, sequence: Running, reason: FinishReason, stop_token_id: int | None) -> None:
        self._end(
            sequence,
            Finished(
                reason=reason,
                stop_token_id=stop_token_id,
                prompt_tokens=len(sequence.prompt),
                cached_tokens=sequence.cached_prompt_tokens,
                completion_tokens=len(sequence.output),
            ),
        )

    def _end(self, sequence: Running, event: Event) -> None:
        with self._wake:
            if sequence in self._running:
                self._running.remove(sequence)
        self._tell(sequence, event)

    @staticmethod
    def _tell(sequence: Running, event: Event) -> None:
        try:
            sequence.listener(event)
        except Exception:
            log.exception("a listener failed; its request is cancelled")
            sequence.cancelled = True
