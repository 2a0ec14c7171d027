"""Generations are counted and timed under vLLM's names, whichever way they end."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator

import pytest
from prometheus_client import REGISTRY

from engine.runtime.sequences import Finished, FinishReason, Request, Tokens
from services.chassis.errors import Internal, InvalidRequest, ServiceError
from services.sparse_inference.observation import Event, watch

REQUEST = Request(token_ids=[1, 2, 3, 4], max_tokens=8, resumed_tokens=1)
FINISH = Finished(FinishReason.STOP, 5, prompt_tokens=3, cached_tokens=2, completion_tokens=3)


async def events(*given: Event | ServiceError) -> AsyncIterator[Event]:
    for each in given:
        if isinstance(each, ServiceError):
            raise each
        yield each


def value(model: str, name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"vllm:{name}", {"model_name": model, **labels}) or 0.0


async def test_a_whole_generation_is_counted_once() -> None:
    """Tokens, prompt, hits, first token, gaps and end; tokens that came together share their time."""
    ticks = itertools.count()
    given = (Tokens((7,), cached_tokens=2), Tokens((8, 9), cached_tokens=2), FINISH)
    seen = [each async for each in watch("whole", REQUEST, events(*given), lambda: float(next(ticks)))]
    assert seen == list(given)
    assert value("whole", "prompt_tokens_total") == value("whole", "prefix_cache_queries_total") == 3
    assert value("whole", "prefix_cache_hits_total") == 2
    assert value("whole", "time_to_first_token_seconds_sum") == 1
    for name in ("inter_token_latency_seconds", "time_per_output_token_seconds"):
        assert (value("whole", f"{name}_count"), value("whole", f"{name}_sum")) == (2, 1)
    assert value("whole", "request_success_total", finished_reason="stop") == 1
    assert value("whole", "e2e_request_latency_seconds_count") == 1
    assert value("whole", "request_generation_tokens_sum") == 3


async def test_a_caller_that_leaves_is_an_abort() -> None:
    """Closing the stream early counts as vLLM's abort."""
    stream = watch("left", REQUEST, events(Tokens((7,)), FINISH))
    await anext(stream)
    await stream.aclose()
    assert value("left", "request_success_total", finished_reason="abort") == 1


@pytest.mark.parametrize(("error", "count"), [(Internal("x"), 1), (InvalidRequest("x"), 0)])
async def test_failures_count_and_refusals_do_not(error: ServiceError, count: int) -> None:
    """A failed generation ended with an error; a refused one never began."""
    with pytest.raises(type(error)):
        async for _ in watch(f"fail{count}", REQUEST, events(error)):
            pass
    assert value(f"fail{count}", "request_success_total", finished_reason="error") == count
