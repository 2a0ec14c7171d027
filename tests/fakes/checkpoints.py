"""Random-weight model directories of every family in the Hugging Face layout, and what transformers computes from them.

`write_checkpoint(directory, family, **overrides)` writes config.json, weights, generation_config.json and a byte-level
tokenizer, small enough for any test, and gives back a `Written` that computes the reference logits in float32.
Needs torch and transformers (dependency group `numerics`).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

FAMILIES = ("glm", "glm4", "llama", "qwen2", "qwen3", "minicpm")
SPECIAL_TOKENS = ("<|endoftext|>", "<|user|>", "<|assistant|>")
SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + 256

_BASE: dict[str, Any] = {
    "vocab_size": 275, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": [0],
}  # fmt: skip
_OWN: dict[str, dict[str, Any]] = {
    "glm": {"head_dim": 16, "attention_bias": False},
    "glm4": {"head_dim": 16, "attention_bias": True},
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 24},
    "minicpm": {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 32, "tie_word_embeddings": True},
}
_CLASSES = {
    "glm": ("GlmConfig", "GlmForCausalLM"),
    "glm4": ("Glm4Config", "Glm4ForCausalLM"),
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
    "minicpm": ("LlamaConfig", "LlamaForCausalLM"),
}
_MINICPM_ONLY = ("scale_emb", "scale_depth", "dim_model_base")


@dataclass(frozen=True, slots=True)
class Written:
    """A model directory, and the same weights as a transformers model in float32."""

    directory: Path
    settings: Mapping[str, Any]
    model: Any

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """Float32 logits after every token, [tokens, vocabulary]."""
        with torch.no_grad():
            result: np.ndarray = self.model(torch.tensor([list(token_ids)]), use_cache=False).logits[0].numpy()
        return result

    def greedy(self, token_ids: Sequence[int], count: int) -> list[int]:
        """The next `count` tokens, each the likeliest, whether or not they would end a text."""
        chosen: list[int] = []
        past, pending = None, list(token_ids)
        with torch.no_grad():
            for _ in range(count):
                out = self.model(torch.tensor([pending]), past_key_values=past, use_cache=True)
                past, pending = out.past_key_values, [int(out.logits[0, -1].argmax())]
                chosen += pending
        return chosen


class _FatRelu(torch.nn.Module):
    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x > self.threshold, x, torch.zeros_like(x))


def write_checkpoint(
    directory: Path,
    family: str,
    *,
    dtype: str = "float32",
    seed: int = 7,
    max_shard_size: str | int | None = None,
    **overrides: Any,
) -> Written:
    """Writes a random model of one of FAMILIES. `overrides` are entries of its config.json.

    `dtype` is float32, float16 or bfloat16; the weights of the returned model are the rounded ones. `max_shard_size`
    (for example "100KB") makes several files with an index. Weights are large enough that logits depend on every part.
    """
    settings = copy.deepcopy(_BASE | _OWN[family] | overrides)  # transformers adds entries to nested ones
    if settings["vocab_size"] < SMALLEST_VOCABULARY:
        raise ValueError(f"the byte-level tokenizer needs a vocab_size of at least {SMALLEST_VOCABULARY}")
    directory.mkdir(parents=True, exist_ok=True)
    model = _random_model(family, settings, getattr(torch, dtype), seed)
    sizes = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    model.save_pretrained(directory, **sizes)
    _say_what_transformers_cannot(directory / "config.json", family, settings)
    write_tokenizer(directory, settings["vocab_size"])
    model = model.float().eval()
    return Written(directory, settings, _folded(model, settings) if family == "minicpm" else model)


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    """A byte-level vocabulary without merges: special tokens first, one id per byte, the rest never occurs in text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    spare = [f"<|spare-{number}|>" for number in range(vocab_size - SMALLEST_VOCABULARY)]
    names = [*SPECIAL_TOKENS, *alphabet, *spare]
    tokenizer = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*SPECIAL_TOKENS])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIAL_TOKENS[0]}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def _random_model(family: str, settings: Mapping[str, Any], dtype: torch.dtype, seed: int) -> Any:
    config_class, model_class = _CLASSES[family]
    given = {name: value for name, value in settings.items() if name not in _MINICPM_ONLY}
    threshold = given.pop("hidden_act_param", 0.0)
    is_fat = given["hidden_act"] == "fatrelu"
    if is_fat:
        given["hidden_act"] = "relu"
    torch.manual_seed(seed)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**given))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                # Projections keep the size of what passes through.
                is_embedding = "embed" in name
                width = 1.0 / settings.get("scale_emb", 1) if is_embedding else 1.2 * parameter.shape[1] ** -0.5
                parameter.copy_(torch.randn_like(parameter) * width)
            else:
                centre = 0.0 if name.endswith("bias") else 1.0
                parameter.copy_(centre + 0.3 * torch.randn_like(parameter))
            if name == "model.norm.weight":  # of either sign: a tied head would choose the last token for ever
                parameter.mul_(torch.randint_like(parameter, 2) * 2 - 1)
        model.tie_weights()
    if is_fat:
        for layer in model.model.layers:
            layer.mlp.act_fn = _FatRelu(threshold)
    return model.to(dtype)


def _say_what_transformers_cannot(path: Path, family: str, settings: Mapping[str, Any]) -> None:
    """Entries of config.json that transformers itself has no word for."""
    raw = json.loads(path.read_text())
    for name in ("hidden_act", "hidden_act_param", *_MINICPM_ONLY):
        if name in settings:
            raw[name] = settings[name]
    if family == "minicpm":
        raw |= {"model_type": "minicpm", "architectures": ["MiniCPMForCausalLM"]}
    path.write_text(json.dumps(raw, indent=2))


def _folded(model: Any, settings: Mapping[str, Any]) -> Any:
    """MiniCPM is Llama with three scales (arXiv 2404.06395, table 7); folded into the weights, Llama computes it."""
    config = type(model.config)(**(model.config.to_dict() | {"tie_word_embeddings": False}))
    folded = type(model)(config).eval()
    residual = settings["scale_depth"] * settings["num_hidden_layers"] ** -0.5
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights["lm_head.weight"] = weights["lm_head.weight"] * (settings["dim_model_base"] / settings["hidden_size"])
    for name in weights:
        if name == "model.embed_tokens.weight":
            weights[name] = weights[name] * settings["scale_emb"]
        elif "o_proj" in name or "down_proj" in name:
            weights[name] = weights[name] * residual
    folded.load_state_dict(weights)
    for ours, theirs in zip(folded.model.layers, model.model.layers, strict=True):
        ours.mlp.act_fn = theirs.mlp.act_fn
    return folded
