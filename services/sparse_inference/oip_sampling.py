"""Sampling parameters as callers of vLLM on Triton write them, turned into the worker's own GenerateRequest.

They come as one JSON tensor or as request parameters, numbers now and then as strings. What is not known here is
refused by name: a parameter that is silently dropped changes the answer. Ranges are those the proto declares.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from autoglm.sparse_inference.v1 import sparse_inference_pb2

from services.chassis import bounds
from services.chassis.errors import InvalidRequest

MAX_JSON_BYTES = 64 << 10

_FLOATS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
_ELSEWHERE = {
    "stop": "stop strings are the gateway's; here use stop_token_ids",
    "n": "one choice per request; send several requests",
    "best_of": "one choice per request",
}


def from_json(text: bytes) -> Mapping[str, Any]:
    """The object in a `sampling_parameters` tensor."""
    if len(text) > MAX_JSON_BYTES:
        raise InvalidRequest(f"sampling_parameters: {len(text)} bytes, at most {MAX_JSON_BYTES} are allowed")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidRequest("sampling_parameters: not valid JSON") from None
    if not isinstance(values, dict):
        raise InvalidRequest("sampling_parameters: not a JSON object")
    return values


def apply(values: Mapping[str, Any], request: sparse_inference_pb2.GenerateRequest) -> None:
    """Writes `values` into `request`. Raises InvalidRequest. Without a seed among them the request keeps its own."""
    sampling = request.sampling
    for name, value in values.items():
        if value is None:
            continue
        try:
            if name in _FLOATS:
                setattr(sampling, name, _number(value, float))
            elif name == "top_k":
                sampling.top_k = max(_number(value, int), 0) if value in (-1, "-1") else _number(value, int)
            elif name == "seed":
                sampling.seed = _number(value, int)
            elif name == "max_tokens":
                request.max_tokens = _positive(_number(value, int))
            elif name == "ignore_eos":
                request.ignore_eos = _truth(value)
            elif name == "stop_token_ids":
                request.stop_token_ids[:] = [_number(each, int) for each in _listed(value)]
            elif name == "logit_bias":
                _apply_bias(value, request)
            elif name in _ELSEWHERE:
                if value not in (1, "1", [], ""):
                    raise InvalidRequest(f"sampling parameter {name}: {_ELSEWHERE[name]}", field=name)
            else:
                known = ", ".join((*_FLOATS, "top_k", "seed", "max_tokens", "ignore_eos", "stop_token_ids, logit_bias"))
                raise InvalidRequest(f"sampling parameter {name[:64]!r} is not known here; there are {known}")
        except (ValueError, TypeError, OverflowError):
            raise InvalidRequest(f"sampling parameter {name}: {str(value)[:64]!r} is no value for it") from None
    if broken := bounds.violations(request):
        raise InvalidRequest("; ".join(str(violation) for violation in broken), field=broken[0].path)


def _apply_bias(value: Any, request: sparse_inference_pb2.GenerateRequest) -> None:
    if not isinstance(value, Mapping):
        raise ValueError
    for token, amount in value.items():
        request.sampling.logit_bias.add(token_id=_number(token, int), bias=_number(amount, float))


def _number(value: Any, kind: Callable[[Any], Any]) -> Any:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float | str)
        or (isinstance(value, str) and len(value) > 64)
    ):
        raise ValueError
    if kind is int and isinstance(value, float) and not value.is_integer():
        raise ValueError
    return kind(value)


def _positive(value: int) -> int:
    if value < 1:
        raise ValueError
    return value


def _truth(value: Any) -> bool:
    known = {True: True, False: False, "true": True, "false": False, "True": True, "False": False}
    if not isinstance(value, bool | str) or value not in known:
        raise ValueError
    return known[value]


def _listed(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError
    return value
