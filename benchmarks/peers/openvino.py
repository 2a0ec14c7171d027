"""OpenVINO GenAI as a measured process, in its own environment: its continuous-batching pipeline, step by step.

`python -m benchmarks.peers.openvino convert CHECKPOINT FOLDER BITS` builds a model (int8 per row, or int4 in symmetric
groups of 32; its defaults keep the embedding at 8 bits); without arguments it serves measurements.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.protocol import serve

POSITIONS = 4096
BLOCK = 32  # positions per cache block of its CPU plugin


def convert(checkpoint: str, folder: str, bits: str) -> None:
    """Writes the model by rename."""
    import nncf
    import openvino
    from optimum.exporters.openvino import main_export

    part, whole = Path(folder + ".part"), Path(folder + ".whole")
    for leftover in (part, whole):
        shutil.rmtree(leftover, ignore_errors=True)
    main_export(checkpoint, output=whole, task="text-generation-with-past", stateful=True, convert_tokenizer=True)
    model = openvino.Core().read_model(whole / "openvino_model.xml")
    if bits == "8":
        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
    else:
        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT4_SYM, group_size=32, ratio=1.0)
    shutil.copytree(whole, part, ignore=shutil.ignore_patterns("openvino_model.*"))
    openvino.save_model(model, part / "openvino_model.xml")
    shutil.rmtree(whole)
    os.replace(part, folder)


class OpenVino:
    def __init__(self) -> None:
        import openvino
        import openvino_genai

        self._core, self._api = openvino, openvino_genai
        self._pipeline: Any = None
        self._random = np.random.default_rng(1)
        self._request = 0

    def load(self, model: str, threads: int, options: dict[str, Any]) -> dict[str, Any]:
        self._pipeline = None
        self._vocabulary = json.loads((Path(model) / "config.json").read_text())["vocab_size"]
        schedule = self._api.SchedulerConfig()
        schedule.max_num_batched_tokens = POSITIONS
        schedule.max_num_seqs = 32
        schedule.num_kv_blocks = options.get("blocks", 32 * 320 // BLOCK + POSITIONS // BLOCK)
        schedule.dynamic_split_fuse = True
        schedule.enable_prefix_caching = False
        properties = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"} | options.get("properties", {})
        self._pipeline = self._api.ContinuousBatchingPipeline(model, schedule, "CPU", properties)
        self.prefill(32, {})
        weights = (Path(model) / "openvino_model.bin").stat().st_size
        capabilities = self._core.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return {
            "version": self._core.get_version(),
            "model_bytes": weights,
            "properties": properties,
            "capabilities": list(capabilities),
        }

    def decode(self, prompt: int, new: int, batch: int, options: dict[str, Any]) -> list[float]:
        handles = [self._add(prompt, new + 1) for _ in range(batch)]
        took = []
        while self._pipeline.has_non_finished_requests():
            began = time.perf_counter()
            self._pipeline.step()
            took.append(time.perf_counter() - began)
        del handles
        return took[-new:]  # before them: the prompts, in one or more steps

    def prefill(self, tokens: int, options: dict[str, Any]) -> float:
        began = time.perf_counter()
        handle = self._add(tokens, 1)
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        del handle
        return time.perf_counter() - began

    def _add(self, prompt: int, new: int) -> Any:
        config = self._api.GenerationConfig()
        config.max_new_tokens = new
        config.ignore_eos = True
        config.do_sample = False
        tokens = self._core.Tensor(self._random.integers(1, self._vocabulary, (1, prompt)).astype(np.int64))
        self._request += 1
        return self._pipeline.add_request(self._request, tokens, config)


if __name__ == "__main__":
    if sys.argv[1:2] == ["convert"]:
        convert(*sys.argv[2:])
    else:
        serve(OpenVino())
