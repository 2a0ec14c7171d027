"""The flight recorder: one record per decision, newest in memory, all in a bounded log on disk.

A record holds everything `placement.choose` was given and what it answered, so a replay can call it again. It holds no
prompt: lengths and the hash of the first blocks only. The log is JSON lines: the open file is plain text that
survives kill -9 and reads with `tail`; a full one is compressed to `<path>.<number>.gz` and the oldest are deleted.
docs/decisions/0004 says why.
"""

from __future__ import annotations

import gzip
import json
import logging
import os
import queue
import re
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import IO, Any

from services.scheduler.placement import Candidate, Decision, Request, Verdict
from services.scheduler.policy import BadPolicy, Policy, policy_from

log = logging.getLogger("autoglm.scheduler.records")

FORMAT = 1
MAX_LINE_BYTES = 16 << 20
"""A reader gives up on a longer line: 4,096 candidates take about 2 MiB."""

_CANDIDATE = tuple(field.name for field in fields(Candidate))
_VERDICT = tuple(field.name for field in fields(Verdict))


@dataclass(frozen=True, slots=True)
class Record:
    """One decision with its inputs."""

    sequence: int
    request_id: str
    unix_ns: int
    clock_ns: int
    tie_break_key: int
    prefix_hash: bytes
    policy: Policy
    request: Request
    candidates: tuple[Candidate, ...]
    decision: Decision
    served_endpoint: str = ""
    """Known once the proxy has the worker's response headers."""


class Recorder:
    """The newest records in memory, by sequence; each also goes to `sink`, which must not block."""

    def __init__(self, max_decisions: int, sink: Callable[[dict[str, Any]], None] | None = None) -> None:
        self._max_decisions, self._sink = max_decisions, sink
        self._records: OrderedDict[int, Record] = OrderedDict()
        self._last = 0

    def next_sequence(self) -> int:
        """1, 2, 3 …"""
        self._last += 1
        return self._last

    def add(self, record: Record) -> None:
        """Keeps `record`; the oldest goes when the memory is full."""
        self._records[record.sequence] = record
        if len(self._records) > self._max_decisions:
            self._records.popitem(last=False)
        if self._sink:
            self._sink({"kind": "decision", "record": record})

    def served(self, sequence: int, endpoint: str) -> None:
        """Notes which endpoint the proxy really used."""
        if (record := self._records.get(sequence)) is not None:
            self._records[sequence] = replace(record, served_endpoint=endpoint)
        if self._sink:
            self._sink({"kind": "served", "sequence": sequence, "endpoint": endpoint})

    def of_request(self, request_id: str) -> list[Record]:
        """The decisions of one request, oldest first."""
        return [record for record in self._records.values() if record.request_id == request_id]

    def newest(self, limit: int) -> list[Record]:
        """At most `limit`, newest first."""
        found: list[Record] = []
        for sequence in reversed(self._records):
            if len(found) == limit:
                break
            found.append(self._records[sequence])
        return found


class DecisionLog:
    """Appends records to a file from a thread of its own, so that a slow disk never delays a request."""

    def __init__(
        self, path: str, policy: Policy, max_bytes: int, segments: int, queued: int, dropped: Callable[[str], None]
    ) -> None:
        """`dropped(why)` is called for each record that is lost; from either thread."""
        self._path, self._policy = Path(path), policy
        self._max_bytes, self._segments, self._dropped = max_bytes, segments, dropped
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(queued)
        self._thread = threading.Thread(target=self._write_all, name="decision-log", daemon=True)
        self._file: IO[bytes] | None = None
        self._size = 0

    def start(self) -> None:
        """Opens the file. Raises OSError when that cannot be done: better now than silently later."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._open()
        self._thread.start()

    def append(self, entry: dict[str, Any]) -> None:
        """Hands an entry to the thread; drops it when the queue is full."""
        try:
            self._queue.put_nowait(entry)
        except queue.Full:
            self._dropped("queue_full")

    def stop(self) -> None:
        """Writes what is queued and closes. Blocks until done."""
        self._queue.put(None)
        self._thread.join()

    def _write_all(self) -> None:
        while (entry := self._queue.get()) is not None:
            try:
                self._write(entry)
            except Exception:  # one record is lost; the thread has to live for the next
                log.exception("a decision could not be logged")
                self._dropped("write_failed")
        if self._file is not None:
            self._file.close()

    def _write(self, entry: dict[str, Any]) -> None:
        line = _line(record_as_json(entry["record"]) if entry["kind"] == "decision" else entry)
        if self._file is None or self._size + len(line) > self._max_bytes:
            self._rotate()
        assert self._file is not None
        self._file.write(line)
        self._size += len(line)

    def _open(self) -> None:
        torn = self._path.exists() and self._path.stat().st_size > 0 and not _ends_with_newline(self._path)
        self._file = open(self._path, "ab", buffering=0)
        header = _line(header_as_json(self._policy))
        self._file.write((b"\n" if torn else b"") + header)
        self._size = self._path.stat().st_size

    def _rotate(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._path.exists():
            closed = closed_segments(self._path)
            number = closed[-1][0] + 1 if closed else 1
            target = self._path.with_name(f"{self._path.name}.{number:08d}.gz")
            partial = target.with_suffix(".partial")
            with open(self._path, "rb") as source, gzip.open(partial, "wb", compresslevel=6) as packed:
                shutil.copyfileobj(source, packed)
            os.replace(partial, target)
            self._path.unlink()
            for _, old in [*closed, (number, target)][: -self._segments]:
                old.unlink()
        self._open()


def closed_segments(path: Path) -> list[tuple[int, Path]]:
    """(number, file) of the compressed logs beside `path`, oldest first."""
    pattern = re.compile(re.escape(path.name) + r"\.(\d{8})\.gz")
    found = ((pattern.fullmatch(entry.name), entry) for entry in path.parent.iterdir())
    return sorted((int(match.group(1)), entry) for match, entry in found if match)


def header_as_json(policy: Policy) -> dict[str, Any]:
    """The first line of a log, and again wherever the policy changes: how to read what follows."""
    columns = {"candidate": _CANDIDATE, "verdict": _VERDICT}
    return {"kind": "header", "format": FORMAT, "policy": policy.as_json(), **columns}


def record_as_json(record: Record) -> dict[str, Any]:
    """One line. Candidates and verdicts are lists in the order the header names, to keep lines short."""
    request, decision = record.request, record.decision
    return {
        "kind": "decision",
        "sequence": record.sequence,
        "request_id": record.request_id,
        "unix_ns": record.unix_ns,
        "clock_ns": record.clock_ns,
        "tie_break_key": record.tie_break_key,
        "prefix_hash": record.prefix_hash.hex(),
        "policy": record.policy.version,
        "request": {field.name: getattr(request, field.name) for field in fields(Request)},
        "candidates": [[getattr(candidate, name) for name in _CANDIDATE] for candidate in record.candidates],
        "endpoints": decision.endpoints,
        "replica_ids": decision.replica_ids,
        "refusal": decision.refusal,
        "verdicts": [[getattr(verdict, name) for name in _VERDICT] for verdict in decision.verdicts],
    }


@dataclass(slots=True)
class Reading:
    """What was found in a log beside the records."""

    unreadable_lines: int = 0
    """Torn by a crash, or of an unknown format."""
    served: int = 0
    """Requests whose real endpoint is known."""


def read_log(path: Path, reading: Reading) -> Iterator[Record]:
    """The records of one file, plain or .gz, oldest first; `reading` counts the rest as it goes.

    A `served` line follows its decision by seconds, so records are held back until it comes: at most 1,024 of them.
    """
    held: OrderedDict[int, Record] = OrderedDict()
    policy: Policy | None = None
    with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
        while line := file.readline(MAX_LINE_BYTES):
            if not line.strip():
                continue
            try:
                data = json.loads(line)
                if data["kind"] == "header":
                    while held:  # a restart: the numbers begin anew
                        yield held.popitem(last=False)[1]
                    policy = _policy_of(data)
                elif data["kind"] == "decision" and policy is not None:
                    record = record_from_json(data, policy)
                    held[record.sequence] = record
                elif data["kind"] == "served":
                    reading.served += 1
                    if data["sequence"] in held:
                        held[data["sequence"]] = replace(held[data["sequence"]], served_endpoint=str(data["endpoint"]))
                else:
                    reading.unreadable_lines += 1
            except (ValueError, KeyError, TypeError):
                reading.unreadable_lines += 1
            while len(held) > 1024:
                yield held.popitem(last=False)[1]
    yield from held.values()


def record_from_json(data: dict[str, Any], policy: Policy) -> Record:
    """The record behind a line. Raises KeyError, TypeError or ValueError when it is none."""
    if data["policy"] != policy.version:
        raise ValueError("the policy of this decision is not in the log")
    request = {name: _frozen(value) for name, value in data["request"].items()}
    return Record(
        sequence=data["sequence"],
        request_id=data["request_id"],
        unix_ns=data["unix_ns"],
        clock_ns=data["clock_ns"],
        tie_break_key=data["tie_break_key"],
        prefix_hash=bytes.fromhex(data["prefix_hash"]),
        policy=policy,
        request=Request(**request),
        candidates=tuple(Candidate(*map(_frozen, row)) for row in data["candidates"]),
        decision=Decision(
            endpoints=tuple(data["endpoints"]),
            replica_ids=tuple(data["replica_ids"]),
            refusal=data["refusal"],
            verdicts=tuple(Verdict(*map(_frozen, row)) for row in data["verdicts"]),
        ),
    )


def _policy_of(header: dict[str, Any]) -> Policy:
    if header["format"] != FORMAT or tuple(header["candidate"]) != _CANDIDATE or tuple(header["verdict"]) != _VERDICT:
        raise ValueError("a log of another format")
    try:
        return policy_from(header["policy"])
    except BadPolicy as error:
        raise ValueError(str(error)) from None


def _frozen(value: Any) -> Any:
    """JSON lists back to the tuples they were."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _line(data: dict[str, Any]) -> bytes:
    return json.dumps(data, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def _ends_with_newline(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
