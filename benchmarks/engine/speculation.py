"""What guessing tokens from the text so far gains on text that repeats itself, and costs on text that does not.

The repetitive text of the random model is forced by a bias towards one token: its own draws never repeat.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer

from benchmarks import random_models
from benchmarks.engine import streams, tiny
from benchmarks.harness import Bar
from benchmarks.peers.shapes import SHAPES
from engine.executors.native import NativeExecutor
from engine.precision.plan import PLANS
from engine.runtime.loop import Limits
from engine.runtime.sampling import Sampling

DRAFT = 8
NEVER_SLOWER = 0.95
CODE = "    def value_{0}(self):\n        return self._value_{0}\n\n"


def once(executor: NativeExecutor, prompt: list[int], new: int, sampling: Sampling, draft: int) -> float:
    """Tokens per second of one stream."""
    with streams.running(executor, Limits(max_draft=draft)) as loop:
        stream = streams.ask(loop, prompt, new, sampling)
        stream.wait()
    return sum(stream.counts[1:]) / (stream.times[-1] - stream.times[0])


def drill(quick: bool) -> tuple[list[Bar], dict[str, Any]]:
    """Both arms in turn, on both texts of both models."""
    tokenizer = Tokenizer.from_file(str(tiny.MODEL / "tokenizer.json"))
    code: list[int] = tokenizer.encode("class Values:\n" + "".join(CODE.format(n % 3) for n in range(12))).ids
    noise = [100 + number * 37 % 3000 for number in range(128)]
    makes: dict[str, tuple[Callable[[], NativeExecutor], int]] = {
        "glm-tiny": (lambda: tiny.executor("int8"), 300),
        "q05": (lambda: random_models.executor(SHAPES["q05"], PLANS["int8"], 2), 64),
    }
    bars: list[Bar] = []
    details: dict[str, Any] = {}
    for model, (make, new) in makes.items():
        executor = make()
        bias = {} if model == "glm-tiny" else {17: 100.0}
        texts = {
            "repetitive": (code, Sampling(temperature=0.0, logit_bias=bias)),
            "not repetitive": (noise, Sampling(temperature=1.0, seed=3)),
        }
        for text, (prompt, sampling) in texts.items():
            pairs = [
                (once(executor, prompt, new, sampling, DRAFT), once(executor, prompt, new, sampling, 0))
                for _ in range(1 if quick else 7)
            ]
            ratio = statistics.median(on / off for on, off in pairs)
            details[f"{model}, {text}"] = {"tokens_per_s_on_off": pairs, "ratio": ratio}
            bars.append(
                Bar(f"speculation {model}, {text}: auto / off", f"{ratio:.2f}x", f">= {NEVER_SLOWER:g}x", ratio >= 0.95)
            )
    return bars, details
