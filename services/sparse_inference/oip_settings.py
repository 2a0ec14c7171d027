"""Bounds of the Open Inference Protocol and of ONNX models, part of the worker's settings."""

from __future__ import annotations

from pydantic import Field

from services.chassis.settings import ServiceSettings


class OipSettings(ServiceSettings):
    """Fields that `WorkerSettings` inherits. The size of a request is bounded by max_message_bytes before these."""

    oip_max_tensors: int = Field(256, ge=1, le=4096, description="inputs, and outputs, that one request may name")
    oip_max_parameters: int = Field(64, ge=0, le=1024, description="parameters that one request or tensor may have")
    oip_stream_requests: int = Field(16, ge=1, le=1024, description="requests of one stream at work; more wait unread")
    oip_tenant: str = Field("public", min_length=1, max_length=64, description="whose cached blocks may be used")
    oip_max_tokens: int = Field(16, ge=1, le=131_072, description="tokens generated when a request does not say")
    tokenizer_timeout_ms: int = Field(5_000, ge=1, le=600_000, description="wait for ids of a text, without a deadline")
    onnx_model_mib: int = Field(16_384, ge=1, le=1 << 20, description="an ONNX model with its external data")
    onnx_arena_mib: int = Field(1024, ge=16, le=1 << 20, description="memory of all runs at a time, weights apart")
    onnx_threads: int = Field(1, ge=1, le=256, description="threads of one run")
    onnx_runs: int = Field(2, ge=1, le=64, description="runs at a time; each has a thread of its own")
    onnx_waiting: int = Field(64, ge=0, le=65_536, description="requests queued for a run; further ones are refused")
