"""The catalogue and the limits: what is asked of the worker how often, and what is refused before any work."""

from __future__ import annotations

import pytest

from services.chassis.errors import InvalidRequest, NotFound, TooBusy, Unavailable
from services.gateway.limits import Admission, check, tokens_to_generate
from services.gateway.models import Catalogue, Model
from services.gateway.requests import Chat, Message, Request, Text
from services.gateway.settings import Settings

MODEL = Model("m", "sha256:v", "sha256:t", context_tokens=10, parameters=1)


class Worker:
    """Counts how often it is asked; fails when told to. `clock` is the time it is."""

    def __init__(self) -> None:
        self.asked, self.clock, self.fails = 0, 100.0, False

    async def describe(self) -> Model:
        self.asked += 1
        if self.fails:
            raise Unavailable("gone")
        return MODEL

    def now(self) -> float:
        return self.clock


@pytest.fixture
def worker() -> Worker:
    return Worker()


@pytest.fixture
def catalogue(worker: Worker) -> Catalogue:
    return Catalogue(worker.describe, ttl_s=3, now=worker.now, monotonic=worker.now)


async def test_the_worker_is_asked_once_per_interval(worker: Worker, catalogue: Catalogue) -> None:
    """Within the interval the answer is remembered; after it the worker is asked again; the creation time stays."""
    first = await catalogue.get("m")
    worker.clock += 2
    assert await catalogue.get("m") == first and worker.asked == 1
    worker.clock += 2
    assert (await catalogue.get("m")).created_unix_s == 100 and worker.asked == 2


async def test_a_failure_is_not_remembered(worker: Worker, catalogue: Catalogue) -> None:
    """A worker that comes back is seen at the next request."""
    worker.fails = True
    with pytest.raises(Unavailable):
        await catalogue.all()
    worker.fails = False
    assert [model.name for model in await catalogue.all()] == ["m"]


async def test_an_unknown_model_names_the_known_ones(catalogue: Catalogue) -> None:
    """NotFound tells what could be asked for."""
    with pytest.raises(NotFound, match="available: m"):
        await catalogue.get("other")


def test_room_is_given_back_once() -> None:
    """Releasing twice frees once; a full gateway says when to come back."""
    admission = Admission(capacity=3, retry_after_s=2)
    release = admission.admit(2)
    with pytest.raises(TooBusy) as busy:
        admission.admit(2)
    assert busy.value.retry_after_s == 2
    release()
    release()
    assert admission.in_flight == 0
    admission.admit(100)  # larger than the gateway: served alone
    assert admission.in_flight == 3


def test_tokens_fill_what_the_context_leaves() -> None:
    """The default is cut to what fits; an explicit number that does not fit is refused with both numbers."""
    request = Request("m", (Text("x"),))
    assert tokens_to_generate(request, 4, MODEL, default=3) == 3
    assert tokens_to_generate(request, 4, MODEL, default=512) == 6
    assert tokens_to_generate(Request("m", (Text("x"),), max_tokens=6), 4, MODEL, default=3) == 6
    for bad, tokens in ((Request("m", (Text("x"),), max_tokens=7), 4), (request, 10)):
        with pytest.raises(InvalidRequest, match=f"{tokens} tokens.*10 tokens"):
            tokens_to_generate(bad, tokens, MODEL, default=3)


@pytest.mark.parametrize(
    "request_",
    [
        Request("m", ()),
        Request("m", (Text("x"),) * 9),
        Request("m", (Text("ö" * 600_000),)),
        Request("m", (Chat((Message("user", "x" * 600_000),) * 2),)),
        Request("m", (Text("x"),), top_logprobs=1),
    ],
)
def test_what_no_model_could_serve_is_refused(request_: Request) -> None:
    """No prompt, too many, too much text, or alternatives without log-probabilities."""
    with pytest.raises(InvalidRequest):
        check(request_, Settings())
