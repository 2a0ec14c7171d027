"""`python -m benchmarks.mesh [name of a drill …]`: the mesh's claims, one result file each."""

from __future__ import annotations

import asyncio
import sys

from benchmarks import bad_inputs, canary, failover, mesh_cost, prefix_reuse, rotation
from benchmarks.harness import report, running

DRILLS = {
    "failover": (failover.drill, ""),
    "canary": (canary.drill, canary.REPLICAS),
    "prefix-reuse": (prefix_reuse.drill, ""),
    "bad-inputs": (bad_inputs.drill, ""),
    "rotation": (rotation.drill, ""),
    "mesh-cost": (mesh_cost.drill, mesh_cost.REPLICAS),
}


def main(names: list[str]) -> int:
    """Runs the named drills, all by default, each on a mesh of its own. Returns 1 when a bar was missed."""
    missed = 0
    for name in names or list(DRILLS):
        if name not in DRILLS:
            print(f"{name}: no such drill; there are {', '.join(DRILLS)}", file=sys.stderr)
            return 2
        drill, replicas = DRILLS[name]
        print(f"# {name}")
        with running(replicas) as mesh:
            bars, details = asyncio.run(drill(mesh))
        report(name, bars, details)
        missed += sum(not bar.is_met for bar in bars)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
