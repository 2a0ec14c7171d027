"""glm-tiny in the native executor, packed into a folder of the caller's or a temporary one."""

from __future__ import annotations

import tempfile
from pathlib import Path

import autoglm_kernels as kernels

from engine.checkpoints.architecture import Architecture
from engine.checkpoints.opening import open_checkpoint
from engine.checkpoints.packed import pack_or_open
from engine.executors.native import KvKind, NativeExecutor
from engine.precision.plan import Plan, plan_for

MODEL = Path(__file__).resolve().parents[2] / "models/glm-tiny"


def architecture() -> Architecture:
    """Its sizes."""
    return open_checkpoint(MODEL).architecture


def executor(
    plan: str | Plan, threads: int = 2, pages: int = 2048, kv: KvKind = "bf16", skips: bool = True
) -> NativeExecutor:
    """A ready executor; skipping applies to plans given by name."""
    checkpoint = open_checkpoint(MODEL)
    arch = checkpoint.architecture
    chosen = plan_for(plan, arch, skips) if isinstance(plan, str) else plan
    with tempfile.TemporaryDirectory() as folder:  # what is mapped stays when its name is gone
        weights = pack_or_open(checkpoint, chosen, Path(folder), threads, lambda done, total: None)
    return NativeExecutor(arch, chosen, weights, kernels.Device(threads, False, ""), pages, 512, kv)
