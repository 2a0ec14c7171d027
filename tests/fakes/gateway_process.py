"""A gateway process with scripted neighbours, for the tests of its public face and of its faults."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from autoglm.gateway.v1 import gateway_pb2_grpc

from tests.fakes.gateway_peers import Peers
from tests.fakes.processes import Service, running


@dataclass(frozen=True)
class GatewayUnderTest:
    """The process and where to reach it."""

    service: Service
    rest_url: str

    @asynccontextmanager
    async def stub(self) -> AsyncIterator[gateway_pb2_grpc.GatewayServiceStub]:
        async with grpc.aio.insecure_channel(self.service.address) as channel:
            yield gateway_pb2_grpc.GatewayServiceStub(channel)


@asynccontextmanager
async def listening_peers() -> AsyncIterator[Peers]:
    peers = Peers()
    await peers.server.start()
    yield peers
    await peers.server.stop(0)


@contextmanager
def gateway_over(address: str, **environment: str) -> Iterator[GatewayUnderTest]:
    """A gateway whose mesh is the server at `address`."""
    variables: dict[str, Any] = {"AUTOGLM_MESH_ADDRESS": address, "AUTOGLM_REST_PORT": "0"} | environment
    with running("services.gateway", **variables) as service:
        port = service.wait_for("listening")["rest_port"]
        yield GatewayUnderTest(service, f"http://127.0.0.1:{port}")


def budget_book(factory: pytest.TempPathFactory, text: str) -> Path:
    """A file of token budgets, in a folder of its own."""
    path = factory.mktemp("budgets") / "budgets.toml"
    path.write_text(text)
    return path
