"""Files exported here, run by llama.cpp: the same greedy tokens. Skipped where llama-cpp-python is not installed.

`AUTOGLM_PEERS_VENV` names a virtual environment that has it (`make bench-peers` makes one). llama.cpp runs in a process
of its own and gets token ids, not text.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed: run `make test` (group numerics)")

from engine.checkpoints.export_gguf import export_gguf
from engine.checkpoints.opening import open_checkpoint
from engine.executors.interface import Span, Wants
from engine.executors.reference import ReferenceExecutor
from tests.fakes.checkpoints import write_checkpoint

TOKENS = 48
CLOSE = 0.02
"""Of the logits' range: how far apart llama.cpp's two best may be where it chooses another token."""
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "glm": ("glm", {}),
    "glm-bias-tied": ("glm", {"attention_bias": True, "tie_word_embeddings": True}),
    "glm4": ("glm4", {}),
    "llama": ("llama", {}),
    "llama-llama3": ("llama", {"rope_scaling": LLAMA3, "rope_theta": 500_000.0}),
    "llama-yarn": ("llama", {"rope_scaling": YARN}),
    "llama-linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "minicpm": ("minicpm", {}),
}
SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
SCRIPT = """
import json, sys
import llama_cpp
model = llama_cpp.Llama(
    sys.argv[1], n_ctx=128, n_batch=64, n_threads=1, logits_all=True, verbose=False, type_k=0, type_v=0,
    flash_attn=False,
)
ids, chosen, gaps = json.loads(sys.argv[2]), [], []
follow = json.loads(sys.argv[3])
pending = ids
for token in follow:
    model.eval(pending)
    logits = model.scores[model.n_tokens - 1]
    order = logits.argsort()
    chosen.append(int(order[-1]))
    gaps.append(float((logits[order[-1]] - logits[token]) / (logits[order[-1]] - logits[order[0]])))
    pending = [token]
print(json.dumps([chosen, gaps]))
"""


@pytest.fixture(scope="module")
def python() -> Path:
    venv = os.environ.get("AUTOGLM_PEERS_VENV")
    if not venv:
        pytest.skip("AUTOGLM_PEERS_VENV is not set: run `make bench-peers` and name its llama.cpp environment")
    path = Path(venv) / "bin" / "python"
    if not path.exists() or subprocess.run([path, "-c", "import llama_cpp"], capture_output=True).returncode:
        pytest.skip(f"{venv} has no importable llama_cpp")
    return path


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_chooses_the_same_tokens(name: str, kind: str, python: Path, tmp_path: Path) -> None:
    """llama.cpp, led along our greedy text, would have chosen each of its tokens.

    It quantises activations to eight bits before a Q8_0 product, so there a near tie may fall the other way.
    """
    family, changes = CASES[name]
    write_checkpoint(tmp_path / "hf", family, **(SHAPE | {"head_dim": 32} | changes))
    original = open_checkpoint(tmp_path / "hf")
    export_gguf(original, tmp_path / "hf", tmp_path / "out.gguf", kind)
    prompt = [random.Random(4).randrange(3, 259) for _ in range(11)]
    ours = _greedy(ReferenceExecutor(open_checkpoint(tmp_path / "out.gguf"), page_count=8), prompt)
    ran = subprocess.run(
        [python, "-c", SCRIPT, str(tmp_path / "out.gguf"), json.dumps(prompt), json.dumps(ours)],
        capture_output=True, text=True, timeout=50,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    theirs, gaps = json.loads(ran.stdout)
    different = [place for place in range(TOKENS) if theirs[place] != ours[place]]
    assert len(set(ours)) > 3, "a constant continuation would prove nothing"
    assert max(gaps) <= (CLOSE if kind == "Q8_0" else 1e-3), (different, max(gaps))
    assert len(different) <= (3 if kind == "Q8_0" else 0), (different, max(gaps))


def _greedy(executor: ReferenceExecutor, prompt: list[int]) -> list[int]:
    chosen: list[int] = []
    pending, start = prompt, 0
    while len(chosen) < TOKENS:
        (logits,) = executor.step([Span(pending, start, range(6), Wants.LAST)])
        assert logits is not None
        start += len(pending)
        pending = [int(logits[0].argmax())]
        chosen += pending
    return chosen
