"""The log file of one supervised process: bounded by one rotation, its last lines kept in memory."""

from __future__ import annotations

from collections import deque
from pathlib import Path

TAIL_LINES = 40
LINE_BYTES = 16_384


class BoundedLog:
    """At most `limit_bytes` in `path` and as much again in `path.1`. One writer."""

    def __init__(self, path: Path, limit_bytes: int) -> None:
        self.path, self.limit_bytes = path, limit_bytes
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)
        self._size = self._file.tell()
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)

    def write(self, line: bytes) -> None:
        """Appends one line, without its newline; a very long one is cut."""
        line = line[:LINE_BYTES]
        if self._size + len(line) + 1 > self.limit_bytes and self._size:
            self._file.close()
            self.path.replace(self.path.with_name(self.path.name + ".1"))
            self._file = self.path.open("ab", buffering=0)
            self._size = 0
        self._file.write(line + b"\n")
        self._size += len(line) + 1
        self.tail.append(line.decode("utf-8", "replace"))

    def close(self) -> None:
        """Closes the file; the tail stays."""
        self._file.close()


class LineSplitter:
    """Cuts a byte stream into lines; holds at most one line of `LINE_BYTES`."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that are complete now."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > LINE_BYTES:
            lines.append(self._rest)
            self._rest = b""
        return lines

    def rest(self) -> bytes:
        """What came after the last newline."""
        rest, self._rest = self._rest, b""
        return rest
