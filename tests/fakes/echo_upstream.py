"""A gRPC server without stubs that says who it is: what a mesh test needs behind Envoy.

Whatever the service, method `Say` answers at once with the server's name, `Stream` sends the name once and then again
per `release`, so a test decides when a stream goes on instead of sleeping, `Echo` returns each message as it comes.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Self

import grpc

SAY = "/echo.Echo/Say"
STREAM = "/echo.Echo/Stream"
ECHO = "/echo.Echo/Echo"


class EchoUpstream:
    """One server on a port of its own. Use with `async with`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.port = 0
        self.metadata: list[dict[str, str]] = []
        self.bodies: list[bytes] = []
        self._releases: asyncio.Queue[bool] = asyncio.Queue()
        self._server = grpc.aio.server()

    async def __aenter__(self) -> Self:
        self._server.add_generic_rpc_handlers(
            (
                _ByMethod(
                    {
                        "Say": grpc.unary_unary_rpc_method_handler(self._say),
                        "Stream": grpc.unary_stream_rpc_method_handler(self._stream),
                        "Echo": grpc.stream_stream_rpc_method_handler(self._echo),
                    }
                ),
            )
        )
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.stop(None)

    def release(self, *, is_last: bool = False) -> None:
        """Lets the running stream send one more message, or end."""
        self._releases.put_nowait(is_last)

    async def _say(self, request: bytes, context: "grpc.aio.ServicerContext[Any, Any]") -> bytes:
        self.metadata.append({key: str(value) for key, value in context.invocation_metadata() or ()})
        self.bodies.append(request)
        return self.name.encode()

    async def _stream(self, request: bytes, context: "grpc.aio.ServicerContext[Any, Any]") -> AsyncIterator[bytes]:
        yield self.name.encode()
        while not await self._releases.get():
            yield self.name.encode()

    async def _echo(
        self, requests: AsyncIterator[bytes], context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> AsyncIterator[bytes]:
        async for request in requests:
            yield request


class _ByMethod(grpc.GenericRpcHandler):
    def __init__(self, handlers: dict[str, Any]) -> None:
        self._handlers = handlers

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        return self._handlers.get(str(handler_call_details.method).rsplit("/", 1)[-1])


def channel(port: int, authority: str) -> grpc.aio.Channel:
    """A channel through a listener of Envoy's, asking for `authority`, without gRPC's own retries."""
    options = [("grpc.default_authority", authority), ("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1)]
    return grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options)
