"""Writes a trained `Glm` as the directory HF transformers and our own engine load, and reads it back.

Called after training and by the measurement, which always scores the exported bf16 weights, not the training ones.
The chat template renders exactly the text that `data.chat_ids` trains on; it needs nothing but a sandboxed Jinja.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from services.trainer.pretrain.bpe import END, SPECIAL_TOKENS
from services.trainer.pretrain.glm import Glm, GlmShape

STOP_TOKENS = (END, "<|user|>", "<|observation|>")
"""Any of these ends a generation: the text is over, or the model would speak for somebody else."""

CHAT_TEMPLATE = """\
{%- set names = {'system': '<|system|>', 'developer': '<|system|>', 'user': '<|user|>', \
'assistant': '<|assistant|>', 'tool': '<|observation|>', 'observation': '<|observation|>'} -%}
{{- '[gMASK]<sop>' -}}
{%- for message in messages -%}
{%- if message['role'] not in names -%}
{{- raise_exception('unknown role: ' ~ message['role']) -}}
{%- endif -%}
{{- names[message['role']] ~ '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- elif message['content'] -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}
{{- part['text'] -}}
{%- else -%}
{{- raise_exception('content part is not text: ' ~ part['type']) -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>\\n' -}}
{%- endif -%}
"""


def write(model: Glm, tokenizer: Tokenizer, out: Path) -> None:
    """Writes weights, configuration, tokenizer and template into `out`; each file is replaced atomically."""
    out.mkdir(parents=True, exist_ok=True)
    stop_ids = [token_id(tokenizer, token) for token in STOP_TOKENS]
    pad_id = token_id(tokenizer, END)
    tensors = {
        f"model.{name}": parameter.detach().to("cpu", torch.bfloat16).contiguous()
        for name, parameter in model.named_parameters()
    }
    save_file(tensors, out / "model.tmp", metadata={"format": "pt"})
    (out / "model.tmp").chmod(0o644)
    os.replace(out / "model.tmp", out / "model.safetensors")
    config = model.shape.hf_config(stop_ids, pad_id)
    _write_json(out / "config.json", config)
    _write_json(out / "generation_config.json", {"eos_token_id": stop_ids, "pad_token_id": pad_id})
    write_text(out / "tokenizer.json", tokenizer.to_str(pretty=False))
    _write_json(out / "tokenizer_config.json", _tokenizer_config(tokenizer, model.shape.max_position_embeddings))
    write_text(out / "chat_template.jinja", CHAT_TEMPLATE)


def read(directory: Path) -> Glm:
    """The exported model with its bf16 weights widened to fp32."""
    config = json.loads((directory / "config.json").read_text())
    shape = GlmShape(**{field.name: config[field.name] for field in fields(GlmShape)})
    return _filled(shape, load_file(directory / "model.safetensors"))


def from_checkpoint(path: Path) -> tuple[Glm, dict[str, float]]:
    """The model in a training checkpoint and its counters: tokens seen and seconds spent."""
    with safe_open(path, framework="pt") as file:
        metadata: dict[str, str] = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys() if name.startswith("model.")}
    defaults = GlmShape()
    shape = GlmShape(**{f.name: type(getattr(defaults, f.name))(metadata[f.name]) for f in fields(GlmShape)})
    return _filled(shape, tensors), {"tokens": int(metadata["tokens"]), "spent_s": float(metadata["spent_s"])}


def weights_digest(directory: Path) -> str:
    """Names the exported weights; measurements carry it, so a stale one is never shown for a newer model."""
    return "sha256:" + hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()


def token_id(tokenizer: Tokenizer, token: str) -> int:
    number: int | None = tokenizer.token_to_id(token)
    if number is None:
        raise ValueError(f"the tokenizer has no token {token!r}; was it trained by services.trainer.pretrain.bpe?")
    return number


def write_text(path: Path, text: str) -> None:
    """Replaces `path` in one step, so a reader never sees half a file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _filled(shape: GlmShape, tensors: dict[str, torch.Tensor]) -> Glm:
    model = Glm(shape)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
    return model.eval()


def _tokenizer_config(tokenizer: Tokenizer, max_length: int) -> dict[str, Any]:
    added = {
        str(token_id(tokenizer, token)): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for token in SPECIAL_TOKENS
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": added,
        "additional_special_tokens": list(SPECIAL_TOKENS),
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": END,
        "pad_token": END,
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
