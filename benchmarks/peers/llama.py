"""llama.cpp as a measured process, through the C interface: `llama_batch`, several sequences in one decode.

Runs in llama.cpp's own environment. Options of a measurement: `flash` (attention kernel: 0 or 1), `ubatch` (rows of one
prefill graph), `unified` (1: one cache for all sequences).
"""

from __future__ import annotations

import ctypes
import time
from typing import Any

import llama_cpp as api
import numpy as np

from benchmarks.peers.protocol import serve

POSITIONS = 4096  # of the longest sequence measured, prompt and answer
SEQUENCES = 32


class Llama:
    def __init__(self) -> None:
        self._log: list[str] = []
        self._sink = api.llama_log_callback(lambda level, text, _: self._log.append(text.decode(errors="replace")))
        api.llama_log_set(self._sink, ctypes.c_void_p(0))
        api.llama_backend_init()
        self._model = self._context = None
        self._random = np.random.default_rng(1)

    def load(self, model: str, threads: int, options: dict[str, Any]) -> dict[str, Any]:
        chosen = api.llama_model_default_params()
        chosen.n_gpu_layers = 0
        chosen.use_extra_bufts = True  # repacked weights, where this processor has kernels for them
        self._model = api.llama_model_load_from_file(model.encode(), chosen)
        if not self._model:
            raise RuntimeError("llama.cpp cannot load it: " + "".join(self._log[-5:]))
        self._vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        self._threads = threads
        self.prefill(32, {})
        buffers = [line.strip() for line in self._log if "buffer size" in line or "repack" in line.lower()]
        return {
            "system": api.llama_print_system_info().decode(),
            "model_bytes": api.llama_model_size(self._model),
            "buffers": buffers[:12],
        }

    def decode(self, prompt: int, new: int, batch: int, options: dict[str, Any]) -> list[float]:
        self._open(batch, batch * (prompt + new + 8), options)
        unified = options.get("unified", 0) == 1
        for sequence in range(batch if unified else 1):
            tokens = self._random.integers(0, self._vocabulary, prompt)
            self._run(tokens, range(prompt), [sequence] * prompt, [False] * (prompt - 1) + [True])
        for sequence in range(1, 1 if unified else batch):
            # Each sequence has a cache of its own, so this copies bytes: the steps read as much as with other prompts.
            api.llama_memory_seq_cp(api.llama_get_memory(self._context), 0, sequence, -1, -1)
        tokens = self._random.integers(0, self._vocabulary, batch)
        took = []
        for step in range(new):
            began = time.perf_counter()
            self._run(tokens, [prompt + step] * batch, range(batch), [True] * batch)
            tokens = np.array([self._best(row) for row in range(batch)])
            took.append(time.perf_counter() - began)
        return took

    def prefill(self, tokens: int, options: dict[str, Any]) -> float:
        self._open(1, tokens + 8, options)
        prompt = self._random.integers(0, self._vocabulary, tokens)
        began = time.perf_counter()
        self._run(prompt, range(tokens), [0] * tokens, [False] * (tokens - 1) + [True])
        self._best(tokens - 1)
        return time.perf_counter() - began

    def _open(self, sequences: int, positions: int, options: dict[str, Any]) -> None:
        """A fresh context: its cache is empty and holds no more than this measurement needs."""
        if self._context:
            api.llama_free(self._context)
        chosen = api.llama_context_default_params()
        chosen.n_ctx = -(-max(positions, 512) // 256) * 256
        chosen.n_batch = POSITIONS
        chosen.n_ubatch = options.get("ubatch", 512)
        chosen.n_seq_max = sequences
        chosen.n_outputs_max = max(SEQUENCES, sequences)
        chosen.n_threads = chosen.n_threads_batch = self._threads
        chosen.flash_attn_type = options.get("flash", 1)
        chosen.kv_unified = options.get("unified", 0) == 1
        chosen.no_perf = True
        self._context = api.llama_init_from_model(self._model, chosen)
        if not self._context:
            raise RuntimeError("llama.cpp gives no context: " + "".join(self._log[-5:]))

    def _run(self, tokens: Any, positions: Any, sequences: Any, wants: list[bool]) -> None:
        count = len(tokens)
        batch = api.llama_batch_init(count, 0, 1)
        batch.n_tokens = count
        for row, (token, position, sequence) in enumerate(zip(tokens, positions, sequences, strict=True)):
            batch.token[row], batch.pos[row], batch.logits[row] = int(token), position, wants[row]
            batch.n_seq_id[row] = 1
            batch.seq_id[row][0] = sequence
        status = api.llama_decode(self._context, batch)
        api.llama_batch_free(batch)
        if status != 0:
            raise RuntimeError(f"llama_decode says {status}: " + "".join(self._log[-3:]))

    def _best(self, row: int) -> int:
        logits = api.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocabulary,)).argmax())


if __name__ == "__main__":
    serve(Llama())
