"""Sampling parameters in vLLM's spelling become the worker's, or are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from autoglm.sparse_inference.v1 import sparse_inference_pb2 as pb

from services.chassis.errors import InvalidRequest
from services.sparse_inference import oip_sampling


def applied(**values: Any) -> pb.GenerateRequest:
    request = pb.GenerateRequest(request_id="r", tenant="t", token_ids=[1], max_tokens=16)
    request.sampling.seed = 5
    oip_sampling.apply(values, request)
    return request


def test_numbers_come_as_numbers_or_as_text() -> None:
    """The samples of vLLM's backend send text; both mean the same, and what is absent keeps its default."""
    given = {"temperature": 0.5, "top_p": 0.25, "top_k": 3, "max_tokens": 9, "seed": 7, "ignore_eos": True}
    assert applied(**given) == applied(**{name: str(value) for name, value in given.items()})
    assert applied().sampling.seed == 5 and applied().max_tokens == 16 and applied(temperature=None) == applied()


def test_top_k_of_minus_one_is_off() -> None:
    """As vLLM has it."""
    assert applied(top_k=-1).sampling.top_k == 0


def test_lists_and_biases_are_taken() -> None:
    """Stop ids and logit biases, whose keys are text in JSON."""
    request = applied(stop_token_ids=[3, 4], logit_bias={"7": -1.5}, n=1, stop=[])
    assert list(request.stop_token_ids) == [3, 4]
    assert [(entry.token_id, entry.bias) for entry in request.sampling.logit_bias] == [(7, -1.5)]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"temperature": 101}, "sampling.temperature: 101 is more than 100"),
        ({"temperature": "nan"}, "not a finite number"),
        ({"temperature": "warm"}, "temperature: 'warm' is no value"),
        ({"temperature": True}, "temperature: 'True' is no value"),
        ({"temperature": [1]}, "is no value"),
        ({"top_k": 1.5}, "top_k: '1.5' is no value"),
        ({"top_k": -2}, "top_k"),
        ({"seed": -1}, "seed"),
        ({"seed": 1 << 64}, "seed"),
        ({"max_tokens": 0}, "max_tokens: '0' is no value"),
        ({"max_tokens": 1 << 20}, "max_tokens: 1048576 is more than 131072"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"stop_token_ids": 3}, "stop_token_ids"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"stop": ["\n"]}, "stop strings are the gateway's"),
        ({"n": 2}, "one choice per request"),
        ({"guided_json": {}}, "'guided_json' is not known here; there are temperature"),
    ],
)
def test_what_is_out_of_range_or_unknown_is_refused_by_name(values: dict[str, Any], text: str) -> None:
    """Nothing is dropped in silence: that would change the answer."""
    with pytest.raises(InvalidRequest) as caught:
        applied(**values)
    assert text in caught.value.message


@pytest.mark.parametrize("text", [b"", b"[1]", b"{", b"\xff", b"[" * 60_000, b" " * 70_000, b'"x"'])
def test_json_that_is_no_object_is_refused(text: bytes) -> None:
    """Malformed, nested without end, too long: a typed error."""
    with pytest.raises(InvalidRequest, match="sampling_parameters"):
        oip_sampling.from_json(text)
