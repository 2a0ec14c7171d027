"""What is written down about a training run as it happens: plan, machine, whether it is finished.

The model card reads this instead of anybody's memory. Lives as `run.json` beside the checkpoint.
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from services.trainer.pretrain.export import write_text
from services.trainer.pretrain.train import DECAY_FROM, WARM_UP, Plan


@dataclass(frozen=True, slots=True)
class Run:
    """One training run. `is_finished` stays true: a finished run is never trained further by accident."""

    plan: dict[str, Any]
    machine: dict[str, Any]
    corpus: dict[str, Any]
    is_finished: bool = False
    tokens: int = 0
    spent_s: float = 0.0
    schedule: dict[str, float] = field(default_factory=lambda: {"warm_up_until": WARM_UP, "decay_from": DECAY_FROM})

    def finished(self, tokens: int, spent_s: float) -> Run:
        return replace(self, is_finished=True, tokens=tokens, spent_s=spent_s)

    def save(self, path: Path) -> None:
        write_text(path, json.dumps(asdict(self), indent=1) + "\n")


def begin(plan: Plan, corpus: dict[str, Any]) -> Run:
    return Run(plan=json.loads(json.dumps(asdict(plan))), machine=machine(), corpus=corpus)


def load(path: Path) -> Run | None:
    return Run(**json.loads(path.read_text())) if path.exists() else None


def machine() -> dict[str, Any]:
    """The hardware and versions that decide how fast, and to the last bit what, a run computes."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
