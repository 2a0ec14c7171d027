"""ONNX Runtime GenAI as a measured process, in its own environment.

`python -m benchmarks.peers.onnxruntime convert CHECKPOINT FOLDER` builds a model (int4 in groups of 32, accuracy level
4: int8 activations, its fastest on CPUs); without arguments it serves measurements.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as api

from benchmarks.peers.protocol import serve

POSITIONS = 4096


def convert(checkpoint: str, folder: str) -> None:
    """Writes the model by rename. Raises subprocess.CalledProcessError."""
    part = folder + ".part"
    extra = ["int4_accuracy_level=4", "int4_block_size=32"]
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", checkpoint, "-i", checkpoint, "-o", part]
    command += ["-p", "int4", "-e", "cpu", "-c", folder + ".cache", "--extra_options", *extra]
    subprocess.run(command, check=True)
    os.replace(part, folder)


class OnnxRuntime:
    def __init__(self) -> None:
        self._model: Any = None
        self._random = np.random.default_rng(1)

    def load(self, model: str, threads: int, options: dict[str, Any]) -> dict[str, Any]:
        path = Path(model) / "genai_config.json"
        settings = json.loads(path.read_text())
        self._vocabulary = settings["model"]["vocab_size"]
        session = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        overlay = {"model": {"decoder": {"session_options": session}}, "search": {"past_present_share_buffer": True}}
        config = api.Config(model)
        config.overlay(json.dumps(overlay))
        self._model = api.Model(config)
        self.prefill(32, {})
        weights = sum(file.stat().st_size for file in Path(model).glob("*.onnx*"))
        return {"version": api.__version__, "model_bytes": weights, "session_options": session}

    def decode(self, prompt: int, new: int, batch: int, options: dict[str, Any]) -> list[float]:
        generator = self._start(batch, prompt + new + 8)
        generator.append_tokens(self._tokens(batch, prompt))
        generator.generate_next_token()  # takes the prompt's logits; no model run yet
        took = []
        for _ in range(new):
            began = time.perf_counter()
            generator.generate_next_token()
            took.append(time.perf_counter() - began)
        return took

    def prefill(self, tokens: int, options: dict[str, Any]) -> float:
        generator = self._start(1, tokens + 8)
        prompt = self._tokens(1, tokens)
        began = time.perf_counter()
        generator.append_tokens(prompt)
        generator.generate_next_token()
        return time.perf_counter() - began

    def _start(self, batch: int, positions: int) -> Any:
        params = api.GeneratorParams(self._model)
        params.set_search_options(
            batch_size=batch, max_length=positions, min_length=positions, do_sample=False, num_beams=1
        )
        return api.Generator(self._model, params)

    def _tokens(self, batch: int, count: int) -> Any:
        return self._random.integers(1, self._vocabulary, (batch, count)).astype(np.int32)


if __name__ == "__main__":
    if sys.argv[1:2] == ["convert"]:
        convert(*sys.argv[2:])
    else:
        serve(OnnxRuntime())
