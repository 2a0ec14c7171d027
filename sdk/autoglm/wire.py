"""Converts protobuf messages into the SDK's data, and speaks grpc.health.v1 without its stubs.

The messages of the health protocol are wire-compatible with protobuf's well-known wrappers: a request is one string in
field 1, an answer one enum in field 1.
"""

from __future__ import annotations

from typing import Literal

from google.protobuf.wrappers_pb2 import Int32Value, StringValue

from autoglm.completion import Alternative, Health, Model, Token, TokenCount, Usage
from autoglm.gateway.v1 import gateway_pb2
from autoglm.type.v1 import generation_pb2

HEALTH_METHOD = "/grpc.health.v1.Health/Check"
GATEWAY_SERVICE = "autoglm.gateway.v1.GatewayService"

_HEALTH: tuple[Literal["unknown", "serving", "not_serving", "service_unknown"], ...] = (
    "unknown", "serving", "not_serving", "service_unknown",
)  # fmt: skip


def health_request(service: str) -> bytes:
    """A serialised HealthCheckRequest."""
    return StringValue(value=service).SerializeToString()


def health_of(response: bytes, latency_s: float) -> Health:
    """What a serialised HealthCheckResponse says."""
    number = Int32Value.FromString(response).value
    return Health(_HEALTH[number] if 0 <= number < len(_HEALTH) else "unknown", latency_s)


def token_of(token: gateway_pb2.TokenText) -> Token:
    """One token with its alternatives."""
    return Token(
        token.token_id,
        token.content,
        token.logprob if token.HasField("logprob") else None,
        tuple(Alternative(other.token_id, other.content, other.logprob) for other in token.top),
    )


def usage_of(usage: generation_pb2.Usage) -> Usage:
    """Token counts."""
    return Usage(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens)


def models_of(response: gateway_pb2.ListModelsResponse) -> tuple[Model, ...]:
    """The models of a listing."""
    return tuple(
        Model(model.name, model.variant_digest, model.context_tokens, model.parameters, model.created_unix_s)
        for model in response.models
    )


def count_of(response: gateway_pb2.CountTokensResponse) -> TokenCount:
    """A token count."""
    return TokenCount(response.tokens, response.tokenizer_digest)
