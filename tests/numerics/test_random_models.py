"""The random models that speed is measured with: what is said of them must hold in the run that is measured."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("autoglm_kernels", reason="the kernels are not compiled: run `make test`")

from benchmarks import random_models
from benchmarks.peers.shapes import SHAPES
from engine.executors.interface import Span, Wants
from engine.precision.plan import plan_for


@pytest.mark.parametrize("precision", ["int8", "int4", "int4-head4"])
def test_as_many_gates_stay_shut_as_were_asked_for(precision: str) -> None:
    """Also while the model follows its own greedy choices, which may lead it into tokens of another kind."""
    shape = SHAPES["glm-tiny"]
    plan = plan_for(precision, random_models.architecture(shape), True)
    model = random_models.executor(shape, plan, 1, context=256, kv_tokens=256, max_rows=32, inactive=0.88)
    active, neurons = model.model.active_neurons, model.model.all_neurons
    token = 1
    for position in range(48):
        (logits,) = model.step([Span([token], position, list(range(16)), Wants.LAST)])
        assert logits is not None
        token = int(np.argmax(logits[0]))
    share = (model.model.active_neurons - active) / (model.model.all_neurons - neurons)
    assert 0.08 <= share <= 0.16, share
