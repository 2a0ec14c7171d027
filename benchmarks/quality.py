"""`python -m benchmarks.quality`: what each number format costs glm-tiny in quality, on text it never saw.

Bits per byte of held-out standard library, and how far the next-token distribution of each format is from that of bf16
weights (Kullback-Leibler divergence per token). Every arm is the executor that serves.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from benchmarks.engine import tiny
from benchmarks.harness import Bar, report
from engine.executors.interface import F32, Span, Wants
from engine.executors.native import KvKind
from engine.precision.plan import PLANS, Format, Plan, plan_for
from services.trainer.pretrain import corpus
from services.trainer.pretrain.bpe import PREFIX

WINDOW = 512
WINDOWS = 40
BASE = "bf16"
WANTED = {"int8": 0.5, "int4": 1.5}
"""Bits per byte may grow by so many percent."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to hold weights, keys and values."""

    plan: Plan
    kv: KvKind = "bf16"


@dataclass(frozen=True, slots=True)
class Text:
    """Held-out windows of WINDOW tokens, the model's prefix included, and the bytes they stand for."""

    windows: list[list[int]]
    prefix: int
    bytes: int


def arms() -> dict[str, Arm]:
    """Everything that is compared, the base first."""
    arch = tiny.architecture()
    found = {name: Arm(plan_for(name, arch, False)) for name in ("bf16", "int8", "int4", "int4-head4")}
    for name in ("int8", "int4", "int4-head4"):
        found[f"{name} skipping"] = Arm(plan_for(name, arch, True))
    for group in (64, 128):
        form = Format("int4", group)
        found[f"int4 groups of {group}"] = Arm(
            Plan(f"int4-g{group}", form, form, PLANS["int8"].head, PLANS["int8"].embedding)
        )
    for name in ("bf16", "int8"):
        found[f"{name}, keys and values int8"] = Arm(found[name].plan, "int8")
    return found


def held_out() -> Text:
    """The same windows on every machine with the same Python."""
    tokenizer = Tokenizer.from_file(str(tiny.MODEL / "tokenizer.json"))
    prefix = [tokenizer.token_to_id(token) for token in PREFIX]
    documents = corpus.load().held_out
    windows: list[list[int]] = []
    size = 0
    for number in np.random.default_rng(0).permutation(len(documents)):
        ids = tokenizer.encode(documents[number].text, add_special_tokens=False).ids
        if len(ids) < WINDOW:
            continue
        own = ids[: WINDOW - len(prefix)]
        windows.append(prefix + own)
        size += len(tokenizer.decode(own, skip_special_tokens=False).encode())
        if len(windows) == WINDOWS:
            break
    return Text(windows, len(prefix), size)


def log_probabilities(arm: Arm, text: Text) -> list[F32]:
    """After every token of every window, [tokens, vocabulary]."""
    executor = tiny.executor(arm.plan, pages=WINDOW // 16 + 1, kv=arm.kv)
    pages = list(range(WINDOW // 16 + 1))
    found = []
    for window in text.windows:
        (logits,) = executor.step([Span(window, 0, pages, Wants.ALL)])
        assert logits is not None
        wide = logits.astype(np.float64)
        wide -= wide.max(1, keepdims=True)
        wide -= np.log(np.exp(wide).sum(1, keepdims=True))
        found.append(wide.astype(np.float32))
    return found


def bits_per_byte(found: list[F32], text: Text) -> float:
    """Of the windows without their prefix."""
    first = text.prefix
    nats = sum(
        float(-table[np.arange(first - 1, len(window) - 1), window[first:]].sum(dtype=np.float64))
        for window, table in zip(text.windows, found, strict=True)
    )
    return nats / np.log(2) / text.bytes


def divergence(base: list[F32], found: list[F32]) -> float:
    """Mean over tokens, in nats."""
    return float(np.mean([(np.exp(p) * (p - q)).sum(1).mean() for p, q in zip(base, found, strict=True)]))


def main() -> int:
    """Prints a line per arm and per bar; 1 when a bar was missed."""
    text = held_out()
    rows: dict[str, Any] = {}
    base: list[F32] = []
    for name, arm in arms().items():
        found = log_probabilities(arm, text)
        base = base or found
        bits = bits_per_byte(found, text)
        change = 100 * (bits / rows[BASE]["bits_per_byte"] - 1) if rows else 0.0
        rows[name] = {
            "bits_per_byte": bits,
            "change_percent": change,
            "kl_nats_per_token": divergence(base, found),
            "plan": arm.plan.identity,
            "kv": arm.kv,
        }
        print(
            f"  {name}: {bits:.4f} bits per byte ({change:+.2f} %), KL {rows[name]['kl_nats_per_token']:.6f}",
            flush=True,
        )
    bars = []
    for name, limit in WANTED.items():
        change = rows[name]["change_percent"]
        bars.append(Bar(f"glm-tiny {name}: bits per byte", f"{change:+.2f} %", f"<= +{limit:g} %", change <= limit))
    for name in ("int8", "int4", "int4-head4"):
        difference = abs(rows[name]["bits_per_byte"] - rows[f"{name} skipping"]["bits_per_byte"])
        rows[f"{name} skipping"]["difference_to_dense"] = difference
    details = {"windows": len(text.windows), "tokens": WINDOW * len(text.windows), "bytes": text.bytes, "arms": rows}
    report("quality", bars, details, "python -m benchmarks.quality")
    return 0 if all(bar.is_met for bar in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
