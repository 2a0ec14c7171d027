"""Makes the executor that the settings ask for, and says which arithmetic it has.

The native executor serves; the reference executor is there to compare with. Packing a model for the first time takes a
while, so its progress goes to standard error: a bar on a terminal, a line now and then in a log.
"""

from __future__ import annotations

import os
import sys
import time

import autoglm_kernels as kernels

from engine.checkpoints.digest_cache import default_cache_directory
from engine.checkpoints.packed import Progress, pack_or_open
from engine.checkpoints.variant import Variant
from engine.executors import native, reference
from engine.precision.plan import plan_for
from services.sparse_inference.settings import WorkerSettings

Served = native.NativeExecutor | reference.ReferenceExecutor

BAR_CELLS = 32
LOG_EVERY_S = 5.0


class CannotRun(Exception):
    """The settings ask for an executor that this machine or model does not have; the text says which and why."""


def arithmetic(settings: WorkerSettings) -> str:
    """Everything that decides the bits of the logits beside the checkpoint: part of the variant's digest."""
    if settings.executor == "reference":
        return "float32-reference"
    skips = settings.neuron_skipping == "auto"
    return f"native-1 precision={settings.precision} skipping={skips} kv={settings.kv_precision}"


def make(settings: WorkerSettings, variant: Variant) -> Served:
    """Loads the variant's weights. Raises CheckpointError or CannotRun."""
    arch, room = variant.architecture, settings.kv_capacity_bytes
    if settings.executor == "reference":
        pages = max(1, room // reference.page_bytes(arch))
        limit = settings.max_weights_mib << 20
        return reference.ReferenceExecutor(variant.checkpoint, pages, settings.limits.step_rows, limit)
    threads = settings.threads or len(os.sched_getaffinity(0))
    try:
        plan = plan_for(settings.precision, arch, settings.neuron_skipping == "auto")
        device = kernels.Device(threads, settings.pin_threads, settings.isa)
    except ValueError as error:
        raise CannotRun(str(error)) from None
    directory = (settings.cache_dir or default_cache_directory()) / "packed"
    resident = settings.weights_memory == "resident"
    weights = pack_or_open(variant.checkpoint, plan, directory, threads, _progress(), resident)
    pages = max(1, room // native.page_bytes(arch, settings.kv_precision))
    return native.NativeExecutor(arch, plan, weights, device, pages, settings.limits.step_rows, settings.kv_precision)


def _progress() -> Progress:
    """Draws on a terminal; elsewhere one line every few seconds. Quick packing says nothing."""
    began = last = time.monotonic()
    on_terminal = sys.stderr.isatty()

    def show(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - began < 0.5 or (now - last < (0.1 if on_terminal else LOG_EVERY_S) and done < total):
            return
        last = now
        left = (now - began) * (total - done) / max(1, done)
        text = f"packing weights {done >> 20} of {total >> 20} MiB, {left:.0f} s left"
        if on_terminal:
            filled = BAR_CELLS * done // total
            end = "\n" if done == total else ""
            print(f"\r[{'#' * filled}{'.' * (BAR_CELLS - filled)}] {text}   ", end=end, file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)

    return show
