"""Measures an exported glm-tiny on text it never saw: bits per byte, FFN sparsity, and a few samples.

Called after the export; it scores the bf16 weights that ship, widened to fp32, on CUDA when there is one. Held-out
documents are scored one by one in sliding windows, so every token is scored once, with at least half a window before it
once the document is that long. `[gMASK]<sop>` is context and `<|endoftext|>` is no text: neither is scored.
"""

from __future__ import annotations

import ast
import hashlib
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

from services.trainer.pretrain import baselines, data, export
from services.trainer.pretrain.bpe import PREFIX, encode_documents
from services.trainer.pretrain.corpus import Document, exchanges
from services.trainer.pretrain.glm import Glm

WINDOW, STRIDE = 2048, 1024
TRAIN_SAMPLE_BYTES = 100_000
SAMPLE_TOKENS = 128
PROMPT_CHARACTERS = 300
SAMPLE_SEED = 7
TEMPERATURES = (0.0, 0.0, 0.0, 0.8)
"""One completion and one chat answer per entry; 0 is greedy."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What the model wrote after a held-out prompt. `is_python`: the prompt's code and the text together parse."""

    kind: str
    source: str
    prompt: str
    text: str
    temperature: float
    seed: int | None
    has_ended: bool
    is_python: bool


@dataclass(slots=True)
class Tally:
    """Bits, tokens and bytes of some documents, growing as they are scored."""

    bits: float = 0.0
    tokens: int = 0
    bytes: int = 0

    def add(self, bits: float, tokens: int, byte_count: int) -> None:
        self.bits, self.tokens, self.bytes = self.bits + bits, self.tokens + tokens, self.bytes + byte_count

    def figures(self) -> dict[str, float | int]:
        return {
            "bytes": self.bytes,
            "tokens": self.tokens,
            "bits_per_byte": self.bits / self.bytes,
            "perplexity_per_token": 2 ** (self.bits / self.tokens),
        }


def measure(
    directory: Path,
    held_out: Sequence[Document],
    train: Sequence[Document],
    tokenizer: Tokenizer,
    on_progress: Callable[[float, str], None],
) -> dict[str, Any]:
    """Everything the model card says about quality. `on_progress` gets the share done and what is going on."""
    started = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = export.read(directory).to(device)
    seen = chosen(train, TRAIN_SAMPLE_BYTES)
    work = sum(len(d.text) for d in (*held_out, *seen))
    done = 0
    gates = GateCounter(model)
    packages: dict[str, Tally] = defaultdict(Tally)
    whole, sample_of_train = Tally(), Tally()
    with torch.inference_mode():
        for document in held_out:
            bits, tokens = score(model, tokenizer, document.text, gates)
            size = len(document.text.encode())
            whole.add(bits, tokens, size)
            packages[document.package].add(bits, tokens, size)
            done += len(document.text)
            on_progress(0.9 * done / work, "held-out text")
        gates.close()
        for document in seen:
            sample_of_train.add(*score(model, tokenizer, document.text), len(document.text.encode()))
            done += len(document.text)
            on_progress(0.9 * done / work, "training text, for comparison")
        samples = []
        for sample in write_samples(model, tokenizer, held_out):
            samples.append(sample)
            on_progress(0.9 + 0.1 * len(samples) / (2 * len(TEMPERATURES)), "samples")
    on_progress(1.0, "done")
    return {
        "weights": export.weights_digest(directory),
        "held_out_digest": baselines.digest(held_out),
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "window_tokens": WINDOW,
        "stride_tokens": STRIDE,
        "held_out": {"documents": len(held_out), **whole.figures()},
        "packages": {name: packages[name].figures() for name in sorted(packages)},
        "train_sample": {"documents": len(seen), **sample_of_train.figures()},
        "gates": gates.figures(),
        "samples": [asdict(sample) for sample in samples],
        "took_s": round(time.monotonic() - started, 1),
    }


def chosen(documents: Sequence[Document], limit_bytes: int) -> tuple[Document, ...]:
    """All documents when they fit, else a fixed pseudo-random choice of whole ones (ordered by content hash)."""
    if sum(len(d.text.encode()) for d in documents) <= limit_bytes:
        return tuple(documents)
    kept: list[Document] = []
    room = limit_bytes
    for document in sorted(documents, key=lambda d: d.sha256):
        size = len(document.text.encode())
        if size <= room:
            kept.append(document)
            room -= size
    return tuple(sorted(kept, key=lambda d: d.path))


def windows(first: int, length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, scored from, end): positions first … length − 1 are each scored once, in windows of ≤ `window`."""
    begin, scored = 0, first
    while scored < length:
        end = min(begin + window, length)
        yield begin, scored, end
        begin, scored = end - (window - stride), end


def score(model: Glm, tokenizer: Tokenizer, text: str, gates: GateCounter | None = None) -> tuple[float, int]:
    """Bits the model needs for `text`, and the number of tokens that is."""
    ids = torch.tensor(encode_documents(tokenizer, [text])[0][:-1], device=model.embed_tokens.weight.device)
    bits = 0.0
    for begin, scored, end in windows(len(PREFIX), len(ids), WINDOW, STRIDE):
        span = slice(scored - 1 - begin, end - 1 - begin)
        if gates is not None:
            gates.span = span
        logits = model.logits(model(ids[None, begin:end])[0, span]).float()
        bits += float(functional.cross_entropy(logits, ids[scored:end], reduction="sum")) / math.log(2)
    return bits, len(ids) - len(PREFIX)


class GateCounter:
    """Counts, per layer and hidden unit, how often the ReLU gate is exactly zero over the positions in `span`."""

    def __init__(self, model: Glm) -> None:
        self.span = slice(None)
        self.positions = 0
        shape = (model.shape.num_hidden_layers, model.shape.intermediate_size)
        self._zeros = torch.zeros(shape, dtype=torch.int64, device=model.embed_tokens.weight.device)
        self._hooks = [
            layer.get_submodule("mlp.gate_up_proj").register_forward_hook(self._counting(index))
            for index, layer in enumerate(model.layers)
        ]

    def _counting(self, layer: int) -> Callable[[nn.Module, Any, Tensor], None]:
        def count(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            gate = output.chunk(2, dim=-1)[0][0, self.span]
            self._zeros[layer] += (gate <= 0).sum(0)  # relu(x) is exactly 0 when x ≤ 0
            self.positions += len(gate) if layer == 0 else 0

        return count

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def figures(self) -> dict[str, Any]:
        zeros = self._zeros.double()
        return {
            "positions": self.positions,
            "zero_share": float(zeros.mean()) / self.positions,
            "zero_share_by_layer": [float(layer.mean()) / self.positions for layer in zeros],
            "units_never_active_by_layer": [int((layer == self.positions).sum()) for layer in self._zeros],
        }


def write_samples(model: Glm, tokenizer: Tokenizer, held_out: Sequence[Document]) -> Iterator[Sample]:
    """Completions of held-out signatures and answers to held-out requests, chosen by hash: nobody picked them."""
    signatures = _by_hash((prompt, d.path) for d in held_out for prompt in _signatures(d))
    requests = _by_hash((pair.request, d.path) for d in held_out for pair in exchanges(d))
    for (prompt, source), temperature in zip(signatures, TEMPERATURES, strict=False):
        ids = encode_documents(tokenizer, [prompt])[0][:-1]
        text, has_ended = generate(model, tokenizer, ids, temperature)
        yield _sample("completion", source, prompt, text, temperature, has_ended, prompt + text)
    for (request, source), temperature in zip(requests, TEMPERATURES, strict=False):
        text, has_ended = generate(model, tokenizer, data.chat_prompt_ids(tokenizer, request), temperature)
        yield _sample("chat", source, request, text, temperature, has_ended, text)


def generate(model: Glm, tokenizer: Tokenizer, ids: list[int], temperature: float) -> tuple[str, bool]:
    """Up to `SAMPLE_TOKENS` more tokens, and whether the model ended by itself. Recomputes all: samples are short."""
    device = model.embed_tokens.weight.device
    stops = {export.token_id(tokenizer, token) for token in export.STOP_TOKENS}
    generator = torch.Generator().manual_seed(SAMPLE_SEED)
    written: list[int] = []
    while len(written) < SAMPLE_TOKENS:
        logits = model.logits(model(torch.tensor([ids + written], device=device))[0, -1]).float().cpu()
        if temperature > 0:
            token = int(torch.multinomial(torch.softmax(logits / temperature, 0), 1, generator=generator))
        else:
            token = int(logits.argmax())
        if token in stops:
            return tokenizer.decode(written), True
        written.append(token)
    return tokenizer.decode(written), False


def _sample(kind: str, source: str, prompt: str, text: str, temperature: float, has_ended: bool, code: str) -> Sample:
    try:
        ast.parse(code)
        is_python = bool(text.strip())
    except (SyntaxError, ValueError):
        is_python = False
    seed = SAMPLE_SEED if temperature > 0 else None
    return Sample(kind, source, prompt, text, temperature, seed, has_ended, is_python)


def _by_hash(prompts: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """(prompt, source) pairs, each short prompt once, in an order nobody chose."""
    unique = {prompt: source for prompt, source in prompts if len(prompt) <= PROMPT_CHARACTERS}
    return sorted(unique.items(), key=lambda item: hashlib.sha256(item[0].encode()).digest())


def _signatures(document: Document) -> Iterator[str]:
    """Top-level `def …:` lines with their docstring, as prompts for completion."""
    try:
        tree = ast.parse(document.text)
    except (SyntaxError, ValueError):
        return
    lines = document.text.split("\n")
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and len(node.body) > 1:
            prompt = "\n".join(lines[node.lineno - 1 : node.body[0].end_lineno])
            yield prompt
