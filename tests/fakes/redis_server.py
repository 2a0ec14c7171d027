"""A small server that speaks enough of the Redis protocol for the cache's last tier, and can misbehave on request.

    async with FakeRedis() as server: RedisTier(server.url, …)

It stands beside the real server, which runs the same tests where its binary is installed.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from services.mesh import ports


class FakeRedis:
    """`values` is the database. `is_hung` stops all answers; `stop`/`start` make it vanish and return on its port."""

    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}
        self.is_hung = False
        self.calls = 0
        self.port = 0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, limit=1 << 25)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for writer in list(self._writers):
            writer.close()
        await asyncio.sleep(0)

    async def __aenter__(self) -> FakeRedis:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while line := await reader.readline():
                words = []
                for _ in range(int(line[1:])):
                    size = int((await reader.readline())[1:])
                    words.append((await reader.readexactly(size + 2))[:-2])
                if not self.is_hung:
                    writer.write(self._answer(words[0].upper(), words[1:]))
                    await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    def _answer(self, command: bytes, words: list[bytes]) -> bytes:
        if command == b"SET":
            self.calls += 1
            self.values[words[0]] = words[1]
            return b"+OK\r\n"
        if command == b"GETRANGE":
            self.calls += 1
            data = self.values.get(words[0], b"")[int(words[1]) : int(words[2]) + 1]
            return b"$%d\r\n%s\r\n" % (len(data), data)
        if command in (b"EXISTS", b"DEL"):
            self.calls += 1
            count = sum(word in self.values for word in words)
            if command == b"DEL":
                for word in words:
                    self.values.pop(word, None)
            return b":%d\r\n" % count
        if command == b"HELLO":
            return (
                b"-ERR unknown command 'HELLO'\r\n" if words[:1] != [b"3"] else b"%1\r\n$6\r\nserver\r\n$5\r\nredis\r\n"
            )
        return b"+OK\r\n"


def real_binary() -> str | None:
    """Path of an installed Valkey or Redis server."""
    return shutil.which("valkey-server") or shutil.which("redis-server")


class RealRedis:
    """A real server on a port of its own, which can be killed, started again (empty) and hung."""

    def __init__(self, directory: str) -> None:
        binary = real_binary()
        assert binary is not None
        self.port = next(ports.free("127.0.0.1"))
        self._command = [binary, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        self._command += ["--dir", directory]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Returns when it listens."""
        process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._process = process
        deadline = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 0.2).close()
                return
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(f"{self._command[0]} does not listen") from None

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def hang(self) -> None:
        """Connections are taken, nothing is answered, until `wake`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def wake(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def __enter__(self) -> RealRedis:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


@contextmanager
def real_server(directory: str) -> Iterator[str]:
    """A real server on a free port; yields its URL."""
    with RealRedis(directory) as server:
        yield server.url
