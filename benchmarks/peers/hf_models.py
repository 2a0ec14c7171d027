"""A random Hugging Face checkpoint of a shape, from which OpenVINO's and ONNX Runtime's converters start.

`python -m benchmarks.peers.hf_models SHAPE FOLDER FAMILY`, in an environment with torch and transformers. FAMILY is the
shape's own or `llama` for converters that do not know it. The tokenizer is glm-tiny's: converters want one, and
the measured processes exchange token numbers only.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.peers.shapes import SHAPES, Shape

TOKENIZER = Path(__file__).resolve().parents[2] / "models/glm-tiny"
CONTEXT = 8192


def configuration(shape: Shape, family: str) -> Any:
    """The transformers configuration with these sizes."""
    kinds = {"qwen2": "Qwen2Config", "glm": "GlmConfig", "llama": "LlamaConfig"}
    known: dict[str, Any] = {
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate_size,
        "vocab_size": shape.vocab_size,
        "hidden_act": shape.activation,
        "tie_word_embeddings": shape.tie_word_embeddings,
        "rms_norm_eps": shape.rms_norm_eps,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "rope_theta": shape.rope_theta,
    }
    if family == "glm":
        known["partial_rotary_factor"] = shape.rotary_size / shape.head_dim
    return getattr(transformers, kinds[family])(**known)


def main(shape_name: str, folder: str, family: str) -> None:
    """Writes the checkpoint, by rename; does nothing when it is there."""
    target = Path(folder)
    if target.exists():
        return
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    torch.manual_seed(0)
    config = configuration(SHAPES[shape_name], family)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(part)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, part / name)
    os.replace(part, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
