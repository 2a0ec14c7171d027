"""Runs recorded decisions again: `python -m services.scheduler.replay LOG [LOG.00000001.gz …]`.

Without options every decision must come out as recorded, to the last bit: exit status 1 when one does not. With
`--policy FILE` the same traffic meets another policy, and what would have gone elsewhere is counted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from services.scheduler.placement import Decision, choose
from services.scheduler.policy import BadPolicy, Policy, load_policy
from services.scheduler.records import Reading, Record, closed_segments, read_log

MAX_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Difference:
    """One decision that came out otherwise."""

    record: Record
    replayed: Decision


@dataclass(slots=True)
class Tally:
    """Counts of one replay."""

    decisions: int = 0
    refused: int = 0
    differences: int = 0
    moved: int = 0
    """Differences in the first choice or the refusal, not only in scores or fallbacks."""
    served: int = 0
    served_elsewhere: int = 0
    """Requests that the proxy sent to another endpoint than the first choice."""


def again(record: Record, policy: Policy | None = None) -> Decision:
    """What `choose` makes of the recorded inputs, under the recorded policy or another."""
    return choose(record.request, record.candidates, policy or record.policy, record.clock_ns, record.tie_break_key)


def replay(records: Iterable[Record], tally: Tally, policy: Policy | None = None) -> Iterable[Difference]:
    """Yields what differs; `tally` counts as it goes."""
    for record in records:
        replayed = again(record, policy)
        tally.decisions += 1
        tally.refused += bool(record.decision.refusal)
        if record.served_endpoint:
            tally.served += 1
            tally.served_elsewhere += record.served_endpoint not in record.decision.endpoints[:1]
        if replayed != record.decision:
            tally.differences += 1
            tally.moved += _answer(replayed) != _answer(record.decision)
            yield Difference(record, replayed)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m services.scheduler.replay", description=__doc__)
    parser.add_argument("log", nargs="+", type=Path, help="decision log, plain or .gz")
    parser.add_argument("--all", action="store_true", help="also read the compressed logs beside the first file")
    parser.add_argument("--policy", default="", help="JSON policy to replay under instead of the recorded one")
    options = parser.parse_args(arguments)
    try:
        policy = load_policy(options.policy) if options.policy else None
        files = [*(file for _, file in closed_segments(options.log[0]))] * options.all + options.log
        reading, tally = Reading(), Tally()
        records = (record for file in files for record in read_log(file, reading))
        shown = 0
        for difference in replay(records, tally, policy):
            if shown == 0:
                print(f"{'sequence':>9}  {'request':<24}  {'recorded':<24}  {'replayed':<24}")
            if shown < MAX_SHOWN:
                _show(difference)
            shown += 1
    except (OSError, EOFError, BadPolicy) as error:
        print(f"replay: {error}", file=sys.stderr)
        return 2
    if shown > MAX_SHOWN:
        print(f"… and {shown - MAX_SHOWN} more")
    for name, count in (
        ("decisions", tally.decisions),
        ("identical", tally.decisions - tally.differences),
        ("different", tally.differences),
        ("  of them another choice", tally.moved),
        ("refused when recorded", tally.refused),
        ("served endpoint known", tally.served),
        ("  not the first choice", tally.served_elsewhere),
        ("unreadable lines", reading.unreadable_lines),
    ):
        print(f"{name:<26}{count:>10}")
    if tally.decisions == 0:
        print("replay: no decision was found", file=sys.stderr)
        return 2
    return 1 if tally.differences and policy is None else 0


def _answer(decision: Decision) -> str:
    return decision.endpoints[0] if decision.endpoints else f"({decision.refusal})"


def _show(difference: Difference) -> None:
    record = difference.record
    print(
        f"{record.sequence:>9}  {record.request_id[:24]:<24}  {_answer(record.decision):<24}"
        f"  {_answer(difference.replayed):<24}"
    )


if __name__ == "__main__":
    sys.exit(main())
