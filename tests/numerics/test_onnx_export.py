"""Exported ONNX graphs compute, in onnxruntime, what transformers computes from the same weights."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: run `make test` (group numerics)")
onnx = pytest.importorskip("onnx", reason="onnx is not installed: run `make test` (group export)")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: run `make test` (group onnx)")

from engine.checkpoints import export_onnx as exporter
from engine.checkpoints.export_onnx import export_onnx
from engine.checkpoints.opening import open_checkpoint
from tests.fakes.checkpoints import write_checkpoint

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "glm-bias-relu": ("glm", {"attention_bias": True, "hidden_act": "relu"}),
    "glm4-tied": ("glm4", {"tie_word_embeddings": True}),
    "llama-yarn": ("llama", {"rope_scaling": YARN}),
    "llama-gelu-bias": ("llama", {"hidden_act": "gelu_pytorch_tanh", "attention_bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "minicpm-fatrelu": ("minicpm", {"hidden_act": "fatrelu", "hidden_act_param": 0.1}),
}


def _session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("name", CASES)
def test_graphs_compute_the_reference_logits(name: str, tmp_path: Path) -> None:
    """The whole text at once, in two pieces with the past handed on, and without past inputs: to 1e-4 of the range."""
    family, changes = CASES[name]
    written = write_checkpoint(tmp_path / "hf", family, **changes)
    checkpoint = open_checkpoint(tmp_path / "hf")
    export_onnx(checkpoint, tmp_path / "model.onnx")
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)
    ids = np.array([[random.Random(3).randrange(275) for _ in range(40)]], dtype=np.int64)
    expected = written.logits(ids[0].tolist())
    close = 1e-4 * np.abs(expected).max()
    session = _session(tmp_path / "model.onnx")
    names = [each.name for each in session.get_inputs() if each.name != "input_ids"]
    arch = checkpoint.architecture
    empty = np.zeros((1, arch.num_key_value_heads, 0, arch.head_dim), dtype=np.float32)
    whole = session.run(None, {"input_ids": ids} | dict.fromkeys(names, empty))
    assert np.abs(whole[0][0] - expected).max() <= close
    start = session.run(None, {"input_ids": ids[:, :23]} | dict.fromkeys(names, empty))
    outputs = {
        each.name.replace("present", "past"): value for each, value in zip(session.get_outputs(), start, strict=True)
    }
    rest = session.run(None, {"input_ids": ids[:, 23:]} | {name: outputs[name] for name in names})
    assert np.abs(rest[0][0] - expected[23:]).max() <= close
    export_onnx(checkpoint, tmp_path / "plain.onnx", with_past=False)
    (logits,) = _session(tmp_path / "plain.onnx").run(None, {"input_ids": ids})
    assert np.abs(logits[0] - expected).max() <= close


def test_large_weights_go_to_a_file_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A protobuf message ends at 2 GiB; the graph finds its weights by the name of the file."""
    written = write_checkpoint(tmp_path / "hf", "llama", num_hidden_layers=1)
    monkeypatch.setattr(exporter, "EXTERNAL_BYTES", 1000)
    export_onnx(open_checkpoint(tmp_path / "hf"), tmp_path / "model.onnx", with_past=False)
    assert (tmp_path / "model.onnx.data").stat().st_size > (tmp_path / "model.onnx").stat().st_size
    ids = np.array([[5, 9, 2]], dtype=np.int64)
    (logits,) = _session(tmp_path / "model.onnx").run(None, {"input_ids": ids})
    assert np.allclose(logits[0], written.logits([5, 9, 2]), atol=1e-3)
