"""The gateway without a mesh: the same program, its peers called at their own addresses and not through Envoy.

`benchmarks.mesh_cost` compares it with the one behind Envoy. AUTOGLM_DIRECT is `service=host:port`, comma-separated.
"""

from __future__ import annotations

import asyncio
import os

import grpc

from services.chassis.channels import connect
from services.chassis.settings import ServiceSettings, read
from services.gateway import __main__ as gateway
from services.gateway.settings import Settings


def main() -> None:
    """Runs until SIGTERM."""
    places = dict(item.split("=", 1) for item in os.environ["AUTOGLM_DIRECT"].split(","))

    def direct(settings: ServiceSettings, service: str) -> grpc.aio.Channel:
        return connect(settings.model_copy(update={"mesh_address": places[service]}), service)

    gateway.connect = direct  # type: ignore[attr-defined]  # the one thing that differs
    asyncio.run(gateway.main(read(Settings)))


if __name__ == "__main__":
    main()
