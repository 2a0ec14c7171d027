"""Makes the executor that the settings ask for, and says which arithmetic it has.

The native executor serves; the reference executor is there to compare with. Packing a model for the first time takes a
while, so a `Reporter` says how far it is.
"""

from __future__ import annotations

import os
from pathlib import Path

import autoglm_kernels as kernels

from engine.checkpoints.architecture import Architecture
from engine.checkpoints.digest_cache import default_cache_directory
from engine.checkpoints.packed import pack_or_open
from engine.checkpoints.variant import Variant
from engine.executors import native, reference
from engine.precision.plan import plan_for
from services.chassis.progress import Reporter
from services.sparse_inference.settings import WorkerSettings

Served = native.NativeExecutor | reference.ReferenceExecutor

SKIPS_FROM = 64 << 20
"""Feed-forward weights from which skipping is automatic: smaller ones stay in a cache, where finding the active neurons
costs more than their bytes."""
AUTOMATIC_TOKENS = 4096
"""Per running request, keys and values that an automatic capacity has room for."""
LEAST_PAGES = 64


class CannotRun(Exception):
    """The settings ask for an executor that this machine or model does not have; the text says which and why."""


def arithmetic(settings: WorkerSettings) -> str:
    """Everything that decides the bits of the logits beside the checkpoint: part of the variant's digest."""
    if settings.executor == "reference":
        return "float32-reference"
    return f"native-1 precision={settings.precision} skipping={settings.neuron_skipping} kv={settings.kv_precision}"


def make(settings: WorkerSettings, variant: Variant) -> Served:
    """Loads the variant's weights. Raises CheckpointError or CannotRun."""
    arch = variant.architecture
    if settings.executor == "reference":
        pages = kv_pages(settings, arch, reference.page_bytes(arch), _free_bytes())
        limit = settings.max_weights_mib << 20
        return reference.ReferenceExecutor(variant.checkpoint, pages, settings.limits.step_rows, limit)
    threads = settings.threads or len(os.sched_getaffinity(0))
    try:
        plan = plan_for(settings.precision, arch, skips(settings, arch))
        device = kernels.Device(threads, settings.pin_threads, settings.isa)
    except ValueError as error:
        raise CannotRun(str(error)) from None
    directory = (settings.cache_dir or default_cache_directory()) / "packed"
    resident = settings.weights_memory == "resident"
    free = _free_bytes()
    weights = pack_or_open(variant.checkpoint, plan, directory, threads, Reporter("packing weights"), resident)
    pages = kv_pages(settings, arch, native.page_bytes(arch, settings.kv_precision), max(0, free - weights.nbytes))
    return native.NativeExecutor(arch, plan, weights, device, pages, settings.limits.step_rows, settings.kv_precision)


def skips(settings: WorkerSettings, arch: Architecture) -> bool:
    """Whether inactive neurons are left out. By the model alone, never by the machine: the plan decides its tokens."""
    if settings.neuron_skipping == "auto":
        weights = 3 * arch.num_hidden_layers * arch.hidden_size * arch.intermediate_size
        return weights >= SKIPS_FROM
    return settings.neuron_skipping == "on"


def kv_pages(settings: WorkerSettings, arch: Architecture, page_bytes: int, free_bytes: int) -> int:
    """Pages of keys and values: what the setting says, or as many as all running requests may want, but no more than a
    quarter of the memory that is free beside the weights.
    """
    if settings.kv_capacity_mib:
        return max(1, (settings.kv_capacity_mib << 20) // page_bytes)
    tokens = max(AUTOMATIC_TOKENS * settings.max_running, arch.max_position_embeddings)
    wanted = -(-tokens // native.PAGE_TOKENS)
    return max(min(wanted, free_bytes // 4 // page_bytes), LEAST_PAGES)


def _free_bytes() -> int:
    """Memory that may be taken without swapping, within the control group's limit. Where it cannot be known: 4 GiB."""
    free = 4 << 30
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            free = next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable:"))
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit.isdigit():
            free = min(free, max(0, int(limit) - int((group / "memory.current").read_text())))
    except (OSError, ValueError, StopIteration):
        pass
    return free
