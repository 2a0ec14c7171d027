"""The flight recorder: bounded in memory and on disk, readable after a crash, and every decision replays."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from services.scheduler import replay
from services.scheduler.placement import Candidate, Request, choose
from services.scheduler.policy import Policy
from services.scheduler.records import (
    DecisionLog,
    Reading,
    Record,
    Recorder,
    closed_segments,
    header_as_json,
    read_log,
    record_as_json,
    record_from_json,
)

POLICY = Policy()


def record(sequence: int, policy: Policy = POLICY, **facts: Any) -> Record:
    """A decision over two workers of different load, made by the real function."""
    candidates = tuple(
        Candidate(
            name, f"10.0.0.1:{port}", "m", "v", (("version", "v1"),), max_running=4, max_waiting=4,
            running=(sequence * port) % 5, pending_prefill_tokens=sequence * 7, matched_blocks=port % 3,
        )
        for name, port in (("a", 1), ("b", 2))
    )  # fmt: skip
    request = Request(prompt_tokens=40, max_tokens=8, subset_labels=(("version", "v1"),), **facts)
    decision = choose(request, candidates, policy, 123, sequence)
    return Record(
        sequence, f"request-{sequence}", 10**18, 123, sequence, b"\x01" * 32, policy, request, candidates, decision
    )


def write(path: Path, records: list[Record], max_bytes: int = 1 << 20, segments: int = 3) -> list[str]:
    lost: list[str] = []
    log = DecisionLog(str(path), POLICY, max_bytes, segments, 10_000, lost.append)
    log.start()
    recorder = Recorder(10, log.append)
    for entry in records:
        recorder.add(entry)
    log.stop()
    return lost


def test_the_memory_is_bounded_and_newest_first() -> None:
    """The oldest record goes when the ring is full."""
    recorder = Recorder(3)
    for sequence in range(1, 6):
        recorder.add(record(sequence))
    assert [entry.sequence for entry in recorder.newest(10)] == [5, 4, 3]
    assert [entry.sequence for entry in recorder.newest(2)] == [5, 4]
    assert recorder.of_request("request-4") == [record(4)] and recorder.of_request("request-1") == []


def test_the_served_endpoint_joins_its_record(tmp_path: Path) -> None:
    """In memory and on disk."""
    lines: list[dict[str, Any]] = []
    recorder = Recorder(3, lines.append)
    recorder.add(record(1))
    recorder.served(1, "10.0.0.1:2")
    recorder.served(77, "forgotten already")
    assert recorder.newest(1)[0].served_endpoint == "10.0.0.1:2"
    path = tmp_path / "log"
    path.write_text(
        "\n".join(json.dumps(line) for line in (header_as_json(POLICY), record_as_json(record(1)), lines[1])) + "\n"
    )
    assert list(read_log(path, Reading())) == [replace(record(1), served_endpoint="10.0.0.1:2")]


@given(st.integers(1, 2**62), st.none() | st.lists(st.text(max_size=5), max_size=3).map(tuple))
def test_a_record_survives_its_line(sequence: int, hint: tuple[str, ...] | None) -> None:
    """JSON and back gives the same record, floats to the last bit; so the replay gives the same decision."""
    before = record(sequence, subset_hint=hint)
    after = record_from_json(json.loads(json.dumps(record_as_json(before))), POLICY)
    assert after == before
    assert replay.again(after) == before.decision


def test_the_log_is_bounded_on_disk(tmp_path: Path) -> None:
    """Rotation keeps the newest segments; the files together stay under the bound, and what is left reads back."""
    path = tmp_path / "decisions.jsonl"
    assert write(path, [record(sequence) for sequence in range(1, 401)], max_bytes=8192, segments=3) == []
    segments = closed_segments(path)
    assert len(segments) == 3 and path.stat().st_size <= 8192
    reading = Reading()
    found = [entry for file in (*(file for _, file in segments), path) for entry in read_log(file, reading)]
    assert found == [record(sequence) for sequence in range(401 - len(found), 401)] and len(found) > 20
    assert reading.unreadable_lines == 0


def test_a_torn_line_costs_one_record(tmp_path: Path) -> None:
    """A crash mid-line, then a restart on the same file: everything else is read, and the tear is counted."""
    path = tmp_path / "decisions.jsonl"
    write(path, [record(1), record(2)])
    path.write_bytes(path.read_bytes()[:-20])
    write(path, [record(3)])
    reading = Reading()
    assert [entry.sequence for entry in read_log(path, reading)] == [1, 3]
    assert reading.unreadable_lines == 1


def test_a_restart_costs_no_record(tmp_path: Path) -> None:
    """Numbers begin anew with each process; the records before and after it stay apart in one log."""
    path = tmp_path / "decisions.jsonl"
    write(path, [record(1), record(2)])
    write(path, [record(1), record(2), record(3)])
    assert [entry.sequence for entry in read_log(path, Reading())] == [1, 2, 1, 2, 3]


def test_a_full_queue_drops_and_says_so(tmp_path: Path) -> None:
    """A disk that cannot keep up never holds up a request."""
    lost: list[str] = []
    log = DecisionLog(str(tmp_path / "log"), POLICY, 1 << 20, 1, 2, lost.append)  # not started: nothing drains it
    for sequence in range(5):
        log.append({"kind": "decision", "record": record(sequence)})
    assert lost == ["queue_full"] * 3


def test_no_prompt_is_recorded() -> None:
    """The line knows lengths and one hash; it has no place for token ids or text."""
    line = record_as_json(record(1))
    assert set(line["request"]) == {
        "prompt_tokens", "max_tokens", "model", "variant_digest", "subset_labels", "subset_hint", "deadline_ms"
    }  # fmt: skip


def run(*arguments: object) -> tuple[int, str]:
    command = [sys.executable, "-m", "services.scheduler.replay", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_the_replay_program_finds_what_differs(tmp_path: Path) -> None:
    """Status 0 on a true log; 1 when a recorded decision is not what its inputs give; 2 when there is nothing."""
    path = tmp_path / "decisions.jsonl"
    write(path, [record(sequence) for sequence in range(1, 21)])
    status, output = run(path)
    assert status == 0 and "identical                         20" in output
    tampered = path.read_text().replace('"endpoints":["10.0.0.1:1"', '"endpoints":["10.0.0.9:1"', 1)
    path.write_text(tampered)
    status, output = run(path)
    assert status == 1 and "10.0.0.9:1" in output
    assert run(tmp_path / "nowhere")[0] == 2


def test_what_if_counts_moved_requests(tmp_path: Path) -> None:
    """Under a policy that loves prefixes above all, some requests go elsewhere; that is an answer, not a failure."""
    path, policy = tmp_path / "decisions.jsonl", tmp_path / "policy.json"
    write(path, [record(sequence) for sequence in range(1, 21)])
    weights = {"slots": 0, "queue": 0, "kv": 0, "prefix": 9, "prefill": 0, "fresh": 0}
    policy.write_text(json.dumps({"version": "prefix-first", "weights": weights}))
    status, output = run(path, "--policy", policy)
    moved = next(int(line.split()[-1]) for line in output.splitlines() if "another choice" in line)
    assert status == 0 and 0 < moved < 20
