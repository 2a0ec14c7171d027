"""Which number format each matrix of a model has.

A plan is part of a variant's digest: another plan is another model. Executors that pack weights ask it for every
matrix; it knows nothing of files or kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.checkpoints.architecture import Architecture

Kind = Literal["int8", "int4", "bf16"]
Layout = Literal["panels", "rows", "columns"]

SKIPPABLE = ("relu", "relu2")
"""Activations whose inactive neurons give exact zeros."""


@dataclass(frozen=True, slots=True)
class Format:
    """How one matrix is stored: `group` weights along the input share a scale (bf16 has none)."""

    kind: Kind
    group: int
    layout: Layout = "panels"


@dataclass(frozen=True, slots=True)
class Plan:
    """Formats by role. `skips_neurons` lays up and down projections out by neuron where the activation allows it."""

    name: str
    attention: Format
    feed_forward: Format
    head: Format
    embedding: Format
    skips_neurons: bool = False

    @property
    def identity(self) -> str:
        """Names every choice; two plans with one identity give the same weights, bit for bit."""
        return f"packing-1 {self.attention} {self.feed_forward} {self.head} {self.embedding} skip={self.skips_neurons}"

    def of(self, role: str) -> Format:
        """The format of qkv, o, gate, up, down, head or embedding. Raises KeyError."""
        feed = self.feed_forward
        if self.skips_neurons and role == "up":
            return Format(feed.kind, feed.group, "rows")
        if self.skips_neurons and role == "down":
            # Scales of a column layout are read whole, however few neurons are active: a wide group keeps them few.
            return Format(feed.kind, 128, "columns")
        return {
            "qkv": self.attention,
            "o": self.attention,
            "gate": feed,
            "up": feed,
            "down": feed,
            "head": self.head,
            "embedding": self.embedding,
        }[role]


_INT8 = Format("int8", 128)
_INT4 = Format("int4", 32)
_BF16 = Format("bf16", 128)

PLANS = {
    "bf16": Plan("bf16", _BF16, _BF16, _BF16, _BF16),
    "int8": Plan("int8", _INT8, _INT8, _INT8, _INT8),
    "int4": Plan("int4", _INT4, _INT4, _INT8, _INT8),
    "int4-head4": Plan("int4-head4", _INT4, _INT4, _INT4, Format("int8", 128, "rows")),
}
"""`int4` keeps the head, and with it a tied embedding, in int8, as other engines' 4-bit files do."""


def plan_for(name: str, arch: Architecture, skips: bool) -> Plan:
    """A named plan; `skips` asks for neuron skipping, which only ReLU models in integers have. Raises ValueError."""
    try:
        plan = PLANS[name]
    except KeyError:
        raise ValueError(f"precision {name!r} is unknown; {', '.join(PLANS)} are known") from None
    able = arch.activation in SKIPPABLE and plan.feed_forward.kind != "bf16"
    if not (skips and able):
        return plan
    return Plan(plan.name, plan.attention, plan.feed_forward, plan.head, plan.embedding, True)
