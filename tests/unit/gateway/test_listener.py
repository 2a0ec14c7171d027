"""The REST listener's socket."""

from __future__ import annotations

import socket

from starlette.applications import Starlette

from services.gateway.rest.listener import Listener
from services.gateway.settings import Settings


def test_connections_do_not_wait_for_delayed_acknowledgements() -> None:
    """An accepted connection has TCP_NODELAY: headers and body, or two events, leave at once."""
    listener = Listener(Starlette(), Settings(rest_port=0))
    with socket.create_connection(("127.0.0.1", listener.port)) as client:
        accepted, _ = listener._socket.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert accepted.getpeername() == client.getsockname()
    listener._socket.close()
