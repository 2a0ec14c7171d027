"""The training run: resumable, bounded in time, one progress bar.

Muon (Jordan et al., 2024; `torch.optim.Muon`) moves the hidden matrices, AdamW the embedding and norms. The learning
rate follows warm-up, plateau, linear decay (WSD, arXiv 2404.06395) over *progress*: the larger of tokens seen / tokens
wanted and minutes spent / minutes allowed, so a slow machine still finishes its decay inside the time bound.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from services.trainer.pretrain.glm import Glm, GlmShape

WARM_UP, DECAY_FROM = 0.02, 0.5
"""Shares of progress: end of the warm-up, start of the decay."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One training run. Lengths and batches in tokens, times in minutes."""

    tokens: int = 20_000_000
    minutes: float = 100.0
    batch_tokens: int = 8192
    lengths: tuple[tuple[float, int], ...] = ((0.0, 256), (0.5, 512), (0.9, 2048))
    """Sequence length by progress: short first (attention is a third of the cost at 512), full length last."""
    muon_rate: float = 0.02
    adam_rate: float = 3e-3
    weight_decay: float = 0.05
    seed: int = 20261123
    save_every_s: float = 120.0


@dataclass(frozen=True, slots=True)
class Step:
    """What the progress display is told after each step."""

    progress: float
    tokens: int
    loss: float
    tokens_per_s: float


def train(
    ids: npt.NDArray[np.uint16],
    shape: GlmShape,
    plan: Plan,
    checkpoint: Path,
    on_step: Callable[[Step], None],
) -> Glm:
    """Trains to progress 1.0, saving to `checkpoint` (a directory) as it goes and resuming from it when it exists."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(plan.seed)
    model = Glm(shape).to(device)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=plan.muon_rate, weight_decay=plan.weight_decay, momentum=0.95),
        torch.optim.AdamW(rest, lr=plan.adam_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    base_rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    tokens, spent_s = _resume(checkpoint, model, optimizers, device)
    loss_of = torch.compile(_loss, dynamic=False)
    stream = torch.from_numpy(ids.astype(np.int64))
    last_save = time.monotonic()
    while (progress := max(tokens / plan.tokens, spent_s / 60 / plan.minutes)) < 1.0:
        started = time.monotonic()
        length = max(length for start, length in plan.lengths if progress >= start)
        batch = _batch(stream, plan.batch_tokens // length, length, plan.seed + tokens).to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = loss_of(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves Tensor.backward untyped
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        factor = rate_factor(progress)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group, rate in zip(groups, base_rates, strict=True):
            group["lr"] = rate * factor
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        tokens += plan.batch_tokens
        took = time.monotonic() - started
        spent_s += took
        on_step(Step(progress, tokens, float(loss.detach()), plan.batch_tokens / took))
        if time.monotonic() - last_save > plan.save_every_s:
            _save(checkpoint, model, optimizers, tokens, spent_s)
            last_save = time.monotonic()
    _save(checkpoint, model, optimizers, tokens, spent_s)
    return model


def rate_factor(progress: float) -> float:
    """Learning-rate multiplier in [0, 1] at `progress` in [0, 1]."""
    if progress < WARM_UP:
        return max(0.01, progress / WARM_UP)
    if progress < DECAY_FROM:
        return 1.0
    return max(0.0, (1.0 - progress) / (1.0 - DECAY_FROM))


def _loss(model: Glm, batch: Tensor) -> Tensor:
    """Mean cross-entropy in nats of `batch[:, 1:]` given what stands before."""
    logits = model.logits(model(batch[:, :-1]))
    return functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


def _batch(stream: Tensor, rows: int, length: int, seed: int) -> Tensor:
    """[rows, length + 1] windows at random offsets; the seed is the position in the run, so a resume repeats none."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(stream) - length - 1, (rows,), generator=generator)
    return torch.stack([stream[start : start + length + 1] for start in starts.tolist()])


def _save(checkpoint: Path, model: Glm, optimizers: list[torch.optim.Optimizer], tokens: int, spent_s: float) -> None:
    """Weights, optimizer tensors and counters in one safetensors file, replaced atomically (never a pickle)."""
    tensors = {f"model.{name}": p.detach().cpu().contiguous() for name, p in model.named_parameters()}
    for index, optimizer in enumerate(optimizers):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for number, parameter in enumerate(parameters):
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{index}.{number}.{key}"] = torch.as_tensor(value).cpu().contiguous()
    checkpoint.mkdir(parents=True, exist_ok=True)
    shape = {key: str(value) for key, value in asdict(model.shape).items()}
    counters = {"tokens": str(tokens), "spent_s": str(spent_s)}
    save_file(tensors, checkpoint / "state.tmp", metadata=shape | counters)
    os.replace(checkpoint / "state.tmp", checkpoint / "state.safetensors")


def _resume(
    checkpoint: Path, model: Glm, optimizers: list[torch.optim.Optimizer], device: torch.device
) -> tuple[int, float]:
    path = checkpoint / "state.safetensors"
    if not path.exists():
        return 0, 0.0
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    tensors = load_file(path, device=str(device))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
    for index, optimizer in enumerate(optimizers):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for number, parameter in enumerate(parameters):
            prefix = f"optimizer.{index}.{number}."
            for name, value in tensors.items():
                if name.startswith(prefix):
                    optimizer.state[parameter][name.removeprefix(prefix)] = value
    return int(metadata["tokens"]), float(metadata["spent_s"])
