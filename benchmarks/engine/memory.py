"""Memory and start of a real worker process: peak resident memory under load, and how soon it is ready.

The worker starts twice on an empty cache folder: the first start hashes and packs the weights, the second maps them.
Its peak counts from after the second start, so packing is reported apart. Mapped weights are resident pages too.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
from autoglm.sparse_inference.v1 import sparse_inference_pb2 as pb
from autoglm.sparse_inference.v1 import sparse_inference_pb2_grpc as rpc

from benchmarks import random_checkpoints, random_models
from benchmarks.harness import REPOSITORY, Bar
from benchmarks.peers.shapes import SHAPES
from engine.executors.native import page_bytes
from services.mesh import ports

STREAMS, PROMPT, NEW = 8, 256, 32
READY_S = 2.0
ALLOWED_BYTES = 150_000_000
START_LIMIT_S = 300.0
CASES = (("q05", "int8"), ("q05", "int4"), ("g15", "int8"), ("glm-tiny", "int8"))


class Worker:
    """A worker process on free ports, without a mesh around it. Its start is timed until it says that it is ready."""

    def __init__(self, model: Path, precision: str, cache: Path) -> None:
        supply = ports.free("127.0.0.1")
        self.port = next(supply)
        kept = {key: value for key, value in os.environ.items() if not key.startswith("AUTOGLM_")}
        environment = kept | {
            "AUTOGLM_MODEL_DIR": str(model),
            "AUTOGLM_MODEL_NAME": model.name,
            "AUTOGLM_CACHE_DIR": str(cache),
            "AUTOGLM_PRECISION": precision,
            "AUTOGLM_THREADS": "2",
            "AUTOGLM_GRPC_PORT": str(self.port),
            "AUTOGLM_METRICS_PORT": str(next(supply)),
            "AUTOGLM_MESH_ADDRESS": f"127.0.0.1:{next(supply)}",
            "PYTHONPATH": os.pathsep.join((str(REPOSITORY), str(REPOSITORY / "sdk"))),
        }
        began = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "services.sparse_inference"],
            env=environment,
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self._process.stdout is not None
        seen = []
        for line in self._process.stdout:
            seen.append(line)
            if '"ready"' in line:
                break
        else:
            raise RuntimeError("the worker ended: " + "".join(seen[-5:]))
        self.ready_s = time.monotonic() - began

    def generate(self, prompts: list[list[int]], new: int) -> None:
        """All prompts at once, each to its end."""
        with grpc.insecure_channel(f"127.0.0.1:{self.port}") as channel, ThreadPoolExecutor(len(prompts)) as pool:
            stub = rpc.SparseInferenceServiceStub(channel)

            def one(number: int) -> None:
                request = pb.GenerateRequest(
                    request_id=f"r{number}", token_ids=prompts[number], max_tokens=new, ignore_eos=True, tenant="t"
                )
                for _ in stub.Generate(request, timeout=START_LIMIT_S):
                    pass

            list(pool.map(one, range(len(prompts))))

    def peak_bytes(self) -> int:
        """VmHWM."""
        lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


def measure(name: str, precision: str, folder: Path) -> dict[str, Any]:
    """First and second start of one model, and the second one's peak after serving."""
    model = random_checkpoints.write(SHAPES[name], folder)
    arch = random_models.architecture(SHAPES[name])
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        first = Worker(model, precision, Path(cache))
        packing_peak = first.peak_bytes()
        first.stop()
        packed = sum(file.stat().st_size for file in Path(cache, "packed").glob("*.packed"))
        second = Worker(model, precision, Path(cache))
        try:
            idle = second.peak_bytes()
            second.generate([[8 + (number * 31 + at) % 4000 for at in range(PROMPT)] for number in range(STREAMS)], NEW)
            peak = second.peak_bytes()
        finally:
            second.stop()
    kv = STREAMS * -(-(PROMPT + NEW) // 16) * page_bytes(arch, "bf16")
    return {
        "first_ready_s": first.ready_s,
        "second_ready_s": second.ready_s,
        "packed_bytes": packed,
        "kv_bytes": kv,
        "idle_peak_bytes": idle,
        "peak_bytes": peak,
        "packing_peak_bytes": packing_peak,
        "allowed_bytes": int(1.1 * packed) + kv + ALLOWED_BYTES,
    }


def drill(quick: bool) -> tuple[list[Bar], dict[str, Any]]:
    """Every case; a bar for the peak of each and for the second start of q05 in int8."""
    folder = REPOSITORY / ".cache/engine"
    bars: list[Bar] = []
    details: dict[str, Any] = {}
    for name, precision in CASES[:1] if quick else CASES:
        found = details[f"{name} {precision}"] = measure(name, precision, folder)
        peak, allowed = found["peak_bytes"], found["allowed_bytes"]
        bars.append(
            Bar(
                f"memory {name} {precision}: peak resident",
                f"{peak / 1e6:.0f} MB",
                f"<= {allowed / 1e6:.0f} MB",
                peak <= allowed,
            )
        )
        if (name, precision) == CASES[0]:
            ready = found["second_ready_s"]
            bars.append(
                Bar(f"start {name} {precision}: ready again", f"{ready:.2f} s", f"<= {READY_S:g} s", ready <= READY_S)
            )
    return bars, details
