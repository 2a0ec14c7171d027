"""The worker beside a cache and a scheduler that are slow, restart or vanish: right tokens, kept bounds, no leaks."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from autoglm.cache.v1 import cache_pb2, cache_pb2_grpc
from autoglm.scheduler.v1 import scheduler_pb2, scheduler_pb2_grpc
from autoglm.sparse_inference.v1 import sparse_inference_pb2 as pb
from autoglm.sparse_inference.v1 import sparse_inference_pb2_grpc as rpc
from autoglm.type.v1 import generation_pb2

from engine.runtime.constraints import Compiler, CompilerLimits, Constraint
from engine.runtime.pages import PagePool
from engine.runtime.sampling import Sampling
from engine.runtime.sequences import Failure, Request, Tokens
from services.chassis import deadlines
from services.chassis.errors import InvalidRequest, OutOfTime, TooBusy, Unavailable
from services.sparse_inference import worker as worker_module
from services.sparse_inference.lease import Lease
from services.sparse_inference.prefixes import PUBLISH_BATCH, Prefixes, Scope, StoredBlock
from services.sparse_inference.settings import WorkerSettings
from services.sparse_inference.worker import Worker
from tests.fakes.counting_executor import BLOCK, VOCABULARY, CountingExecutor, next_token
from tests.fakes.processes import running
from tests.fakes.small_tokenizer import END, text_of, tokenizer_json

WAIT_S = 20
GREEDY = Sampling(temperature=0)


class Remote:
    """A cache service that answers when told to. `asked` counts the requests that reached it."""

    def __init__(self) -> None:
        self.asked, self.stored = 0, 0
        self.reached, self.answer = asyncio.Event(), asyncio.Event()
        self.failure: Exception | None = None

    async def match(self, scope: Scope, names: Sequence[bytes]) -> int:
        self.asked += 1
        self.reached.set()
        await self.answer.wait()
        return 0

    async def get(self, scope: Scope, names: Sequence[bytes]) -> AsyncIterator[StoredBlock]:
        raise NotImplementedError
        yield

    async def put(self, scope: Scope, blocks: Sequence[StoredBlock]) -> int:
        if self.failure:
            failure, self.failure = self.failure, None
            raise failure
        await self.answer.wait()
        self.stored += len(blocks)
        return len(blocks)


def make(remote: Remote, executor: CountingExecutor, budget_s: float = WAIT_S, **fields: object) -> Worker:
    settings = WorkerSettings(**({"max_running": 1, "max_waiting": 1} | fields))  # type: ignore[arg-type]
    arch = SimpleNamespace(vocab_size=VOCABULARY, max_position_embeddings=3000, end_token_ids=(END,), parameters=0)
    variant: Any = SimpleNamespace(digest="sha256:v", architecture=arch)
    pages = PagePool(executor.page_count)
    compiler = Compiler(tokenizer_json, VOCABULARY, [END], CompilerLimits())
    worker = Worker(settings, variant, executor, Prefixes(pages, remote, budget_s, 64), pages, compiler)
    worker.start()
    return worker


async def collect(worker: Worker, request: Request, left_s: float | None = None) -> list[int]:
    deadlines.start(left_s)
    tokens: list[int] = []
    async with contextlib.aclosing(worker.run(request, "tenant")) as events:  # type: ignore[type-var]
        async for event in events:
            if isinstance(event, Tokens):
                tokens += event.token_ids
    return tokens


def expected(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


async def finish(worker: Worker) -> None:
    worker.drain()
    assert await worker.ended(WAIT_S)


async def test_time_spent_waiting_for_the_cache_counts_against_the_deadline() -> None:
    """A deadline that passes during the cache's silence ends the request before anything is computed."""
    remote, executor = Remote(), CountingExecutor()
    worker = make(remote, executor, budget_s=0.2)
    with pytest.raises(OutOfTime):
        await collect(worker, Request([1] * 20, 5, GREEDY), left_s=0.1)
    assert executor.computed_tokens == 0
    await finish(worker)


async def test_a_request_without_a_place_is_refused_before_anything_is_fetched_for_it() -> None:
    """Requests that wait for the cache hold a place; what exceeds the bound never reaches the cache."""
    remote, executor = Remote(), CountingExecutor()
    worker = make(remote, executor)
    first = [asyncio.create_task(collect(worker, Request([n] * 20, 3, GREEDY))) for n in (1, 2)]
    while remote.asked < 2:
        await remote.reached.wait()
        await asyncio.sleep(0)
    with pytest.raises(TooBusy, match="wait"):
        await collect(worker, Request([3] * 20, 3, GREEDY))
    assert remote.asked == 2
    remote.answer.set()
    assert await asyncio.gather(*first) == [expected([n] * 20, 3) for n in (1, 2)]
    await finish(worker)


async def test_a_caller_that_leaves_while_the_cache_is_asked_leaves_nothing() -> None:
    """Its place is free again and nothing was queued."""
    remote, executor = Remote(), CountingExecutor()
    worker = make(remote, executor, max_running=1, max_waiting=0)
    call = asyncio.create_task(collect(worker, Request([1] * 20, 3, GREEDY)))
    await remote.reached.wait()
    call.cancel()
    await asyncio.wait([call])
    remote.answer.set()
    assert await collect(worker, Request([2] * 20, 3, GREEDY)) == expected([2] * 20, 3)
    assert executor.computed_tokens == 22
    await finish(worker)


async def test_a_drain_while_the_cache_is_asked_sends_the_request_elsewhere() -> None:
    """UNAVAILABLE, the one answer that is tried again at once."""
    remote = Remote()
    worker = make(remote, CountingExecutor())
    call = asyncio.create_task(collect(worker, Request([1] * 20, 3, GREEDY)))
    await remote.reached.wait()
    worker.drain()
    remote.answer.set()
    with pytest.raises(Unavailable):
        await call
    await finish(worker)


async def test_the_context_is_what_the_memory_can_hold() -> None:
    """A worker with less memory than the model's context says so, instead of refusing every default request."""
    worker = make(Remote(), CountingExecutor(page_count=256))
    assert worker.context_tokens == 1024
    with pytest.raises(InvalidRequest, match="1024"):
        worker.check(Request([1] * 1000, 25, GREEDY))
    worker.check(Request([1] * 1000, 24, GREEDY))
    await finish(worker)


async def test_a_slow_reader_gets_pieces_within_the_bound_and_what_came_before_a_failure() -> None:
    """Tokens that piled up are merged up to the wire's bound; a failure follows them and does not swallow them."""
    sizes, failed = [], False
    queue: asyncio.Queue[Any] = asyncio.Queue()
    for number in range(worker_module.MAX_MERGED_EVENTS + 10):
        queue.put_nowait(Tokens((number % VOCABULARY,)))
    queue.put_nowait(Failure.EXPIRED)
    while not failed:
        for event in worker_module._merge(await worker_module._ready(queue)):
            if isinstance(event, Tokens):
                sizes.append(len(event.token_ids))
            failed = failed or event is Failure.EXPIRED
    assert sizes == [worker_module.MAX_MERGED_EVENTS, 10]


async def test_blocks_computed_by_two_requests_are_published_once() -> None:
    """The second finds the first one's pages; what is published is what was computed, within the queue's bound."""
    remote = Remote()
    remote.answer.set()
    worker = make(remote, CountingExecutor(), budget_s=0)
    publisher = asyncio.create_task(worker._prefixes.publish())
    for _ in range(2):
        assert await collect(worker, Request([1] * 20, 5, GREEDY)) == expected([1] * 20, 5)
    await finish(worker)
    await worker._prefixes.flush(WAIT_S)
    assert remote.stored == 24 // BLOCK
    publisher.cancel()


async def test_an_answer_is_held_to_its_constraint_and_bad_ones_are_refused() -> None:
    """A regular expression is kept, before and after a resume; one that is wrong or contradicted is refused."""
    worker = make(Remote(), CountingExecutor(), budget_s=0)
    constraint = Constraint("regex", "[0-9]{3}-[a-f]{4}")

    async def answer(request: Request, constraint: Constraint = constraint) -> list[int]:
        events = worker.run(request, "tenant", constraint)
        return [token async for event in events if isinstance(event, Tokens) for token in event.token_ids]

    whole = await answer(Request([1] * 5, 50, GREEDY))
    assert len(whole) == 8 and text_of(whole)[3] == "-"
    assert whole[:4] + await answer(Request([1] * 5 + whole[:4], 46, GREEDY, resumed_tokens=4)) == whole
    for bad in ("[", "(" * 200):
        with pytest.raises(InvalidRequest, match="regex"):
            await answer(Request([1], 5, GREEDY), Constraint("regex", bad))
    with pytest.raises(InvalidRequest):
        await answer(Request([1, 2], 5, GREEDY, resumed_tokens=1))
    await finish(worker)


async def test_a_constraint_has_a_time_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is not prepared in time is refused, and the places to prepare are bounded."""
    worker = make(Remote(), CountingExecutor(), budget_s=0, constraint_ms=50, constraints_waiting=0)
    gate = threading.Event()
    monkeypatch.setattr(worker._compiler, "compile", lambda *_: gate.wait(WAIT_S))
    with pytest.raises(InvalidRequest, match="simpler"):
        await anext(worker.run(Request([1], 5, GREEDY), "tenant", Constraint("regex", "a")))
    with pytest.raises(TooBusy):
        await anext(worker.run(Request([1], 5, GREEDY), "tenant", Constraint("regex", "a")))
    gate.set()
    assert await collect(worker, Request([1], 3, GREEDY)) == expected([1], 3)
    await finish(worker)


async def test_publishing_survives_surprises_and_is_flushed() -> None:
    """An exception nobody foresaw costs one batch; `flush` waits for the rest, or drops it knowingly."""
    remote = Remote()
    prefixes = Prefixes(PagePool(1), remote, 0, 64)
    scopes = [Scope("v", f"t{n % 2}", BLOCK) for n in range(6)]
    publisher = asyncio.create_task(prefixes.publish())
    remote.failure = ZeroDivisionError("planted")
    prefixes.keep(scopes[0], b"0" * 32, b"x")
    await prefixes.flush(WAIT_S)
    for number, scope in enumerate(scopes, start=1):
        prefixes.keep(scope, bytes([number]) * 32, b"x")
    await prefixes.flush(0.05)
    assert remote.stored == 0
    remote.answer.set()
    await prefixes.flush(WAIT_S)
    assert remote.stored == 6 and not publisher.done()
    publisher.cancel()


async def test_blocks_that_come_soon_after_others_share_a_call() -> None:
    """The first block is published at once, those behind it together: when a batch is full, or when flushed."""
    remote = Remote()
    remote.answer.set()
    prefixes = Prefixes(PagePool(1), remote, 0, 256, interval_s=3600)
    scope = Scope("v", "t", BLOCK)
    publisher = asyncio.create_task(prefixes.publish())
    sizes: list[int] = []
    put, called = remote.put, asyncio.Event()

    async def counted(scope: Scope, blocks: Sequence[StoredBlock]) -> int:
        sizes.append(len(blocks))
        called.set()
        return await put(scope, blocks)

    remote.put = counted  # type: ignore[method-assign]
    prefixes.keep(scope, bytes(32), b"x")
    await asyncio.wait_for(called.wait(), WAIT_S)
    called.clear()
    for number in range(1, 70):
        prefixes.keep(scope, bytes([number]) * 32, b"x", at_once=False)
    await asyncio.wait_for(called.wait(), WAIT_S)
    assert sizes == [1, PUBLISH_BATCH]
    await prefixes.flush(WAIT_S)
    assert sizes == [1, PUBLISH_BATCH, 70 - 1 - PUBLISH_BATCH]
    publisher.cancel()


async def test_a_prompts_blocks_are_published_without_waiting_for_company() -> None:
    """Another worker may be asked for the same prompt next: what a long interval holds back is only answers' blocks."""
    remote = Remote()
    remote.answer.set()
    prefixes = Prefixes(PagePool(1), remote, 0, 256, interval_s=3600)
    stored = asyncio.Queue[int]()
    put = remote.put

    async def counted(scope: Scope, blocks: Sequence[StoredBlock]) -> int:
        stored.put_nowait(len(blocks))
        return await put(scope, blocks)

    remote.put = counted  # type: ignore[method-assign]
    publisher = asyncio.create_task(prefixes.publish())
    for number in range(3):
        prefixes.keep(Scope("v", "t", BLOCK), bytes([number]) * 32, b"x")
        assert await asyncio.wait_for(stored.get(), WAIT_S) == 1
    publisher.cancel()


class Scheduler:
    """Hears a lease's reports; `hold` breaks after `ends_after` of them."""

    def __init__(self, ends_after: int, interval_s: float = 0.01) -> None:
        self.ends_after, self.interval_s = ends_after, interval_s
        self.leases: list[list[scheduler_pb2.LeaseRequest]] = []
        self.failure: Exception | None = None
        self.third = asyncio.Event()

    async def hold(self, reports: AsyncIterator[scheduler_pb2.LeaseRequest]) -> AsyncIterator[float]:
        if self.failure:
            failure, self.failure = self.failure, None
            raise failure
        heard: list[scheduler_pb2.LeaseRequest] = []
        self.leases.append(heard)
        if len(self.leases) == 3:
            self.third.set()
        yield self.interval_s
        async for report in reports:
            heard.append(report)
            if len(heard) >= self.ends_after:
                return


def lease_of(pages: PagePool, scheduler: Any, worker: Any, monkeypatch: pytest.MonkeyPatch) -> Lease:
    monkeypatch.setattr("services.sparse_inference.lease.registration", lambda *_: scheduler_pb2.LeaseRequest())
    return Lease(WorkerSettings(), worker, pages, scheduler, "127.0.0.1:1", jitter=lambda: 0.0)


async def test_a_renewed_lease_restates_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """With more blocks than a report may hold, a new lease soon knows all of them: one reset, then the rest."""
    names = [number.to_bytes(32, "little") for number in range(10_000)]
    pages = PagePool(20_000)
    for name in names:
        page = pages.take()
        assert page is not None and pages.name(page, name) == page
    worker = make(Remote(), CountingExecutor())
    scheduler = Scheduler(ends_after=8)
    scheduler.failure = ZeroDivisionError("planted: the lease must survive it")
    hold = asyncio.create_task(lease_of(pages, scheduler, worker, monkeypatch).hold())
    await asyncio.wait_for(scheduler.third.wait(), WAIT_S)
    for heard in scheduler.leases[:2]:
        reports = [each.prefixes for each in heard if each.HasField("prefixes")]
        assert [each.reset for each in reports] == [True, False, False]
        assert all(len(each.added) <= 4096 for each in reports)
        assert [name for each in reports for name in each.added] == names
        loads = [number for number, each in enumerate(heard) if each.HasField("load")]
        assert loads[:2] == [1, 5], "everything is restated at once, not a part at each report"
    hold.cancel()
    await finish(worker)


class Peers(cache_pb2_grpc.CacheServiceServicer, scheduler_pb2_grpc.SchedulerServiceServicer):
    """A cache that takes blocks slowly and a scheduler that notes when it is told of the drain."""

    def __init__(self) -> None:
        self.blocks: set[bytes] = set()
        self.registered, self.drained, self.open = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def Match(self, request: cache_pb2.MatchRequest, context: object) -> cache_pb2.MatchResponse:
        return cache_pb2.MatchResponse()

    async def Put(self, requests: AsyncIterator[cache_pb2.PutRequest], context: object) -> cache_pb2.PutResponse:
        got = [request.block.block_hash async for request in requests]
        await self.open.wait()
        self.blocks.update(got)
        return cache_pb2.PutResponse(stored=len(got))

    async def Lease(
        self, requests: AsyncIterator[scheduler_pb2.LeaseRequest], context: object
    ) -> AsyncIterator[scheduler_pb2.LeaseResponse]:
        yield scheduler_pb2.LeaseResponse(epoch=1, report_interval_ms=50)
        async for request in requests:
            self.registered.set()
            if request.HasField("drain"):
                self.drained.set()


async def test_sigterm_tells_the_scheduler_finishes_the_queue_and_publishes() -> None:
    """With one slot: the running and the waiting stream both end well, and their blocks reach the cache."""
    peers = Peers()
    server = grpc.aio.server()
    cache_pb2_grpc.add_CacheServiceServicer_to_server(peers, server)
    scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(peers, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    settings = {"AUTOGLM_MESH_ADDRESS": f"127.0.0.1:{port}", "AUTOGLM_MAX_RUNNING": "1"}

    async def stream(stub: Any, first: int, started: asyncio.Event) -> int:
        sampling = generation_pb2.SamplingParams(temperature=0)
        request = pb.GenerateRequest(
            request_id="r", tenant="t", token_ids=[first] * 40, max_tokens=60, ignore_eos=True, sampling=sampling
        )
        count = 0
        async for message in stub.Generate(request):
            started.set()
            count += len(message.chunk.token_ids)
        return count

    def start() -> Any:
        return running("services.sparse_inference", **settings)

    with contextlib.ExitStack() as stack:
        service = await asyncio.to_thread(stack.enter_context, start())
        async with asyncio.timeout(WAIT_S), grpc.aio.insecure_channel(service.address) as channel:
            stub = rpc.SparseInferenceServiceStub(channel)
            await peers.registered.wait()
            begun, waiting = asyncio.Event(), asyncio.Event()
            one = asyncio.create_task(stream(stub, 50, begun))
            await begun.wait()
            two = asyncio.create_task(stream(stub, 60, waiting))
            while (await stub.GetLoad(pb.GetLoadRequest())).waiting == 0 and not waiting.is_set():
                pass
            service.signal(signal.SIGTERM)
            await peers.drained.wait()
            assert await asyncio.gather(one, two) == [60, 60]
            peers.open.set()
        assert await asyncio.to_thread(service.wait) == 0
    assert len(peers.blocks) == 2 * ((40 + 59) // 16)
    await server.stop(None)


def test_every_failure_has_an_error() -> None:
    """Every failure the loop knows has an error of its own."""
    assert set(worker_module._ERRORS) == set(Failure)
