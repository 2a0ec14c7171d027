"""The HTTP/1.1 server under the REST API: uvicorn, with its signals and its logging left to the chassis."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Generator

import uvicorn
from starlette.applications import Starlette

from services.gateway.settings import Settings


class Listener:
    """Takes its port when made; `serve` returns after `stop`, once running requests ended or the grace is over."""

    def __init__(self, app: Starlette, settings: Settings) -> None:
        family = socket.AF_INET6 if ":" in settings.bind else socket.AF_INET
        self._socket = socket.create_server((settings.bind, settings.rest_port), family=family, backlog=1024)
        # asyncio does this only for sockets that say IPPROTO_TCP, which those of create_server do not; accepted sockets
        # inherit it. Without it a response's second write waits 40 ms for the peer's delayed acknowledgement.
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.port = int(self._socket.getsockname()[1])
        self._server = _Server(
            uvicorn.Config(
                app,
                http="h11",
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=settings.rest_max_connections,
                timeout_keep_alive=settings.rest_keep_alive_s,
                timeout_graceful_shutdown=int(settings.drain_grace_s),
            )
        )

    async def serve(self) -> None:
        await self._server.serve(sockets=[self._socket])

    def stop(self) -> None:
        """Stops accepting and lets running requests finish."""
        self._server.should_exit = True


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield  # signals are the chassis's
