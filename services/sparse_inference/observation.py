"""Counts and times of generations under the names that dashboards and pickers of vLLM servers know.

`watch` stands between the worker's events and whoever sends them on; it changes none of them. Gauges are in `metrics`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing

from prometheus_client import Counter, Histogram

from engine.runtime.sequences import Finished, Request, Tokens
from services.chassis.errors import Internal, OutOfTime

_MODEL = ("model_name",)
_FIRST = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
    2560,
)
_NEXT = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
)
_WHOLE = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)

PROMPT_TOKENS = Counter("vllm:prompt_tokens", "Tokens of prompts whose first token came", _MODEL)
PREFIX_QUERIES = Counter("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache", _MODEL)
PREFIX_HITS = Counter("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache", _MODEL)
SUCCESS = Counter("vllm:request_success", "Generations by how they ended", (*_MODEL, "finished_reason"))
FIRST_TOKEN = Histogram("vllm:time_to_first_token_seconds", "Arrival to first token", _MODEL, buckets=_FIRST)
PER_TOKEN = Histogram("vllm:time_per_output_token_seconds", "Older name of the next", _MODEL, buckets=_NEXT)
BETWEEN_TOKENS = Histogram("vllm:inter_token_latency_seconds", "Token to token", _MODEL, buckets=_NEXT)
WHOLE = Histogram("vllm:e2e_request_latency_seconds", "Arrival to end", _MODEL, buckets=_WHOLE)
PROMPT_SIZES = Histogram("vllm:request_prompt_tokens", "Prompt tokens of a generation", _MODEL, buckets=_TOKENS)
OUTPUT_SIZES = Histogram("vllm:request_generation_tokens", "Tokens a generation made", _MODEL, buckets=_TOKENS)

Event = Tokens | Finished


async def watch(
    model: str, request: Request, events: AsyncIterator[Event], clock: Callable[[], float] = time.monotonic
) -> AsyncGenerator[Event, None]:
    """The same events. What was refused before it began is not counted here."""
    started = last = clock()
    produced, ended = 0, ""
    try:
        async with aclosing(events) as each:  # type: ignore[type-var]
            async for event in each:
                now = clock()
                if isinstance(event, Tokens):
                    _count(model, request, event, now - started if not produced else None, now - last)
                    produced, last = produced + len(event.token_ids), now
                else:
                    ended = event.reason.value
                yield event
    except (GeneratorExit, asyncio.CancelledError, OutOfTime):
        ended = ended or "abort"
        raise
    except Internal:
        ended = "error"
        raise
    finally:
        if ended:
            SUCCESS.labels(model, ended).inc()
            WHOLE.labels(model).observe(clock() - started)
            PROMPT_SIZES.labels(model).observe(_prompt(request))
            OUTPUT_SIZES.labels(model).observe(produced)


def prepare(model: str) -> None:
    """Makes every series of `model` exist, at 0: a scraper sees the names before the first request."""
    for metric in (PROMPT_TOKENS, PREFIX_QUERIES, PREFIX_HITS, FIRST_TOKEN, PER_TOKEN, BETWEEN_TOKENS, WHOLE):
        metric.labels(model)
    PROMPT_SIZES.labels(model)
    OUTPUT_SIZES.labels(model)
    for reason in ("stop", "length", "abort", "error"):
        SUCCESS.labels(model, reason)


def _count(model: str, request: Request, event: Tokens, to_first_s: float | None, since_last_s: float) -> None:
    """Tokens that came at once share the time since the ones before; the first of all has a histogram of its own."""
    if to_first_s is not None:
        FIRST_TOKEN.labels(model).observe(to_first_s)
        PROMPT_TOKENS.labels(model).inc(_prompt(request))
        PREFIX_QUERIES.labels(model).inc(_prompt(request))
        PREFIX_HITS.labels(model).inc(event.cached_tokens)
        return
    count = len(event.token_ids)
    older, newer, each_s = PER_TOKEN.labels(model), BETWEEN_TOKENS.labels(model), since_last_s / count
    for _ in range(count):
        older.observe(each_s)
        newer.observe(each_s)


def _prompt(request: Request) -> int:
    return len(request.token_ids) - request.resumed_tokens
