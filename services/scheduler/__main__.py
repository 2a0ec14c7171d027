"""`python -m services.scheduler`: the endpoint picker, as Envoy's ext_proc server and as the workers' registry."""

from __future__ import annotations

import asyncio
import random
import sys
import time

import uvloop
from autoglm.scheduler.v1 import scheduler_pb2_grpc
from autoglm.third_party import ext_proc_pb2_grpc
from grpc_health.v1 import health_pb2

from services.chassis import settings as chassis_settings
from services.chassis import telemetry
from services.chassis.serving import Member
from services.scheduler import server, server_ext_proc
from services.scheduler.picker import Picker
from services.scheduler.policy import BadPolicy, Policy, load_policy
from services.scheduler.records import DecisionLog, Recorder
from services.scheduler.replicas import ReplicaTable
from services.scheduler.settings import SchedulerSettings

LIVENESS, READINESS = "liveness", "readiness"
"""Health names the endpoint picker protocol asks for, beside the services' own."""


def main() -> int:
    """Reads settings and policy, then serves until SIGTERM."""
    settings = chassis_settings.read(SchedulerSettings)
    try:
        policy = load_policy(settings.policy_path)
    except (BadPolicy, OSError) as error:
        print(f"AUTOGLM_POLICY_PATH: {error}", file=sys.stderr)
        return 2
    uvloop.run(serve(settings, policy))
    return 0


async def serve(settings: SchedulerSettings, policy: Policy) -> None:
    """Wires the parts and runs."""
    member = Member("scheduler", settings, [server.SERVICE, server_ext_proc.SERVICE])
    decision_log = _open_log(settings, policy)
    recorder = Recorder(settings.max_decisions, decision_log.append if decision_log else None)
    table = ReplicaTable(
        settings.max_replicas, settings.max_prefix_blocks, time.monotonic_ns, first_epoch=time.time_ns() // 1_000_000
    )
    dice = random.Random()
    picker = Picker(
        table,
        recorder,
        policy,
        settings.max_hashed_tokens,
        settings.saturated_retry_after_ms / 1000,
        time.monotonic_ns,
        time.time_ns,
        lambda: dice.getrandbits(63),
    )
    draining = asyncio.Event()
    scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(
        server.SchedulerService(table, recorder, settings, draining), member.server
    )
    ext_proc_pb2_grpc.add_ExternalProcessorServicer_to_server(
        server_ext_proc.ExternalProcessor(picker, settings, draining), member.server
    )

    async def begin_drain() -> None:
        await member.health.set(READINESS, health_pb2.HealthCheckResponse.NOT_SERVING)
        draining.set()

    member.before_drain(begin_drain)
    await member.start()
    for name in (LIVENESS, READINESS):
        await member.health.set(name, health_pb2.HealthCheckResponse.SERVING)
    await member.ready()
    await member.run()
    if decision_log:
        await asyncio.to_thread(decision_log.stop)


def _open_log(settings: SchedulerSettings, policy: Policy) -> DecisionLog | None:
    if not settings.decision_log:
        return None
    decision_log = DecisionLog(
        settings.decision_log,
        policy,
        settings.decision_log_bytes,
        settings.decision_log_segments,
        settings.decision_log_queue,
        lambda why: telemetry.fallback("decision_not_logged", why=why),
    )
    decision_log.start()
    return decision_log


if __name__ == "__main__":
    sys.exit(main())
