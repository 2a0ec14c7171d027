"""`python -m tests.long.fuzz_checkpoints --minutes 10` (`make fuzz`): damaged model files until the time is over.

Cases run in a child process whose address space is bounded and which is replaced every few thousand cases. Whatever a
case ends in but success or a typed error, more than a second of processor time, or the child's death, is a finding; it
is named by file and seed, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.fakes.checkpoint_fuzz import attempt, corpus, damaged

BATCH = 3000
EXTRA_BYTES = 1 << 30
"""Address space a child may use beyond what it has after its imports."""
CASE_S = 1.0
BATCH_S = 600.0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.batch is not None:
        return _child(options.first, options.batch)
    end, seed, cases, models, findings = time.monotonic() + 60 * options.minutes, options.first, 0, 0, 0
    while time.monotonic() < end:
        command = [sys.executable, "-m", "tests.long.fuzz_checkpoints", "--first", str(seed), "--batch", str(BATCH)]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=BATCH_S)
        lines = ran.stdout.splitlines()
        for line in lines:
            if line.startswith("finding"):
                findings += 1
                print(line, flush=True)
        if ran.returncode == 0 and lines and lines[-1].startswith("done"):
            cases += int(lines[-1].split()[1])
            models += int(lines[-1].split()[2])
        else:
            findings += 1
            last = lines[-1] if lines else "nothing"
            print(f"finding: the child died ({ran.returncode}) after {last}\n{ran.stderr[-2000:]}", flush=True)
        seed += BATCH
        print(f"{cases} cases, {models} of them still models, {findings} findings, next seed {seed}", flush=True)
    return 1 if findings else 0


def _child(first: int, count: int) -> int:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + EXTRA_BYTES, size + EXTRA_BYTES))
    entries, models = corpus(), 0
    with tempfile.TemporaryDirectory() as name:
        for seed in range(first, first + count):
            entry = entries[seed % len(entries)]
            path = damaged(entry, seed, Path(name))
            print(f"case {entry.name} {seed}", flush=True)
            started = time.process_time()
            try:
                models += attempt(path)
            except BaseException as error:  # a panic of a native library is no Exception
                print(f"finding: {entry.name} {seed}: {type(error).__name__}: {error}", flush=True)
            if (spent := time.process_time() - started) > CASE_S:
                print(f"finding: {entry.name} {seed}: {spent:.2f} s of processor time", flush=True)
    print(f"done {count} {models}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
