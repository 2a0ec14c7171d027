"""`python -m benchmarks.engine [mixed-load|memory|mesh|speculation|fixed-order …] [--quick]`: the engine's own claims.

Each part that ran replaces its entry in benchmarks/results/engine.json and no other. Ends with one line per bar; exit
code 1 when one was missed. `--quick` takes one round of each: to see that everything runs, not to be quoted, so it
writes .cache/engine/quick.json instead.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.engine import fixed_order, memory, mixed_load, speculation, through_mesh
from benchmarks.harness import REPOSITORY, RESULTS, Bar, commit, machine

PARTS = {
    "mixed-load": mixed_load.drill,
    "memory": memory.drill,
    "mesh": through_mesh.drill,
    "speculation": speculation.drill,
    "fixed-order": fixed_order.drill,
}


def main(arguments: list[str]) -> int:
    """Runs the named parts, all by default."""
    quick = "--quick" in arguments
    names = [each for each in arguments if each != "--quick"] or list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        print(f"{unknown[0]}: no such part; there are {', '.join(PARTS)}", file=sys.stderr)
        return 2
    path = REPOSITORY / ".cache/engine/quick.json" if quick else RESULTS / "engine.json"
    bars: list[Bar] = []
    for name in names:
        print(f"# {name}", flush=True)
        found, details = PARTS[name](quick)
        bars += found
        entry = {
            "commit": commit(),
            "command": f"python -m benchmarks.engine {name}{' --quick' if quick else ''}",
            "machine": machine(),
            "unix_s": int(time.time()),
            "bars": [vars(bar) for bar in found],
            **details,
        }
        replace_part(path, name, entry)
    for bar in bars:
        print(f"{bar.name}  {bar.value}  {bar.target}  {'ok' if bar.is_met else 'missed'}")
    return 0 if all(bar.is_met for bar in bars) else 1


def replace_part(path: Path, name: str, entry: dict[str, Any]) -> None:
    """Writes one part's entry; those of other parts stay as they are in the file now, whoever wrote them."""
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"name": "engine", "parts": {}}
    record["parts"][name] = entry
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
