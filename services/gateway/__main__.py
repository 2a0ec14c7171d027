"""`python -m services.gateway`: the public face of the mesh, gRPC and OpenAI-style REST in one process and one loop."""

from __future__ import annotations

import asyncio
import logging
import secrets
import sys
import time

import uvloop
from autoglm.gateway.v1 import gateway_pb2_grpc

from services.chassis.channels import connect
from services.chassis.serving import Member
from services.chassis.settings import read
from services.gateway import observation
from services.gateway.budgets.book import Shelf, WrongBudgets
from services.gateway.budgets.ledger import Ledger, Local
from services.gateway.budgets.redis_ledger import Shared
from services.gateway.budgets.reservations import Budgets
from services.gateway.budgets.store_url import WrongStore
from services.gateway.clients import Tokenizer, Workers
from services.gateway.generation import Gateway
from services.gateway.limits import Admission
from services.gateway.models import Catalogue
from services.gateway.rest import app
from services.gateway.rest.listener import Listener
from services.gateway.server import SERVICE_NAME, GatewayServicer
from services.gateway.settings import Settings

log = logging.getLogger("autoglm.gateway")


async def main(settings: Settings) -> None:
    member = Member("gateway", settings, [SERVICE_NAME])
    log.info("settings", extra={"facts": settings.model_dump()})
    try:
        shelf = Shelf(settings.token_budgets, settings.token_budgets_watch_s)
    except WrongBudgets as error:
        print(f"AUTOGLM_TOKEN_BUDGETS: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    try:
        budgets = Budgets(shelf, _ledger(settings))
    except WrongStore as error:
        print(f"AUTOGLM_BUDGET_STORE_URL: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    tokenizer_channel, worker_channel = connect(settings, "tokenizer"), connect(settings, "sparse-inference")
    workers = Workers(worker_channel, settings.peer_timeout_s, settings.generate_retries, settings.asked_header_bytes)
    gateway = Gateway(
        settings=settings,
        tokenizer=Tokenizer(tokenizer_channel, settings.peer_timeout_s, settings.vocabularies),
        workers=workers,
        catalogue=Catalogue(workers.describe, settings.model_info_ttl_s, time.time, time.monotonic),
        admission=Admission(settings.max_in_flight, settings.retry_after_s),
        budgets=budgets,
        new_seed=lambda: secrets.randbits(63),
    )
    observation.IN_FLIGHT.set_function(lambda: gateway.admission.in_flight)
    gateway_pb2_grpc.add_GatewayServiceServicer_to_server(GatewayServicer(gateway, new_id), member.server)
    rest = Listener(app.build(gateway, new_id, time.time), settings)
    await member.start()
    serving = asyncio.create_task(rest.serve(), name="rest")
    watching = asyncio.create_task(shelf.watch(), name="budgets")

    async def drain() -> None:
        rest.stop()
        await asyncio.gather(serving, member.server.stop(settings.drain_grace_s))

    member.before_drain(drain)
    log.info("listening", extra={"facts": {"rest_port": rest.port}})
    await member.ready()
    await member.run()
    watching.cancel()
    await asyncio.gather(tokenizer_channel.close(None), worker_channel.close(None), budgets.close())


def _ledger(settings: Settings) -> Ledger:
    local = Local(settings.budget_tenants)
    url = settings.budget_store_url.get_secret_value()
    if not url:
        return local
    timeout_s = settings.budget_store_timeout_ms / 1000
    connections, share = settings.budget_store_connections, settings.budget_store_share
    return Shared(url, timeout_s, connections, local, share, settings.budget_tenants)


def new_id() -> str:
    """A name for a request; random, so that no two gateways give the same."""
    return f"req-{secrets.token_hex(16)}"


if __name__ == "__main__":
    uvloop.run(main(read(Settings)))
