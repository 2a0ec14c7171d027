"""Settings of an inference worker."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from engine.runtime.constraints import CompilerLimits
from engine.runtime.loop import Limits
from services.chassis.model_settings import ModelFetchSettings
from services.sparse_inference.handing import Pace
from services.sparse_inference.oip_settings import OipSettings


class WorkerSettings(OipSettings, ModelFetchSettings):
    """AUTOGLM_* of `python -m services.sparse_inference`."""

    model_name: str = Field("glm-tiny", min_length=1, max_length=128, description="public name of the model")
    model_dir: Path = Field(
        Path("models/glm-tiny"),
        description="a directory (Hugging Face), a .gguf or an .onnx file, or sha256:…, fetched from the cache",
    )
    remember_digests: bool = Field(True, description="keep digests of unchanged weight files, so that starts are quick")
    executor: Literal["native", "reference"] = Field("native", description="reference: slow float32, to compare with")
    precision: Literal["bf16", "int8", "int4", "int4-head4"] = Field("int8", description="number format of the weights")
    kv_precision: Literal["bf16", "int8"] = Field("bf16", description="number format of keys and values")
    neuron_skipping: Literal["auto", "on", "off"] = Field(
        "auto", description="leave out inactive neurons of ReLU models; auto: of those larger than a cache"
    )
    threads: int = Field(0, ge=0, le=1024, description="threads of the engine; 0: as many as CPUs may be used")
    pin_threads: bool = Field(False, description="tie each to a CPU; for machines that do nothing else")
    isa: str = Field("", max_length=16, description="portable, avx2, avx512, amx or neon; empty: the best there is")
    weights_memory: Literal["mapped", "resident"] = Field(
        "mapped", description="mapped: shared with other workers; resident: own copy in huge pages"
    )
    labels: str = Field("version=v1", max_length=1024, description="k=v,k2=v2 as the pod's labels would be")
    advertise: str = Field("", max_length=64, description="ip:port Envoy reaches the worker by; empty: its own")
    max_weights_mib: int = Field(65_536, ge=1, le=1 << 30, description="weight files that are read; larger: refused")
    max_running: int = Field(16, ge=1, le=1024, description="requests computed at once")
    max_waiting: int = Field(64, ge=0, le=65_536, description="requests queued; further ones are refused")
    kv_capacity_mib: int = Field(
        0, ge=0, le=1 << 20, description="key-value pages, those of kept prefixes included; 0: by model and free memory"
    )
    step_rows: int = Field(512, ge=16, le=8192, description="rows of one step at most")
    logit_rows: int = Field(64, ge=1, le=8192, description="rows of one step with logits: scoring and drafts")
    step_slowdown: float = Field(1.6, ge=1.0, le=100.0, description="a step with prefill against one that only decodes")
    speculation: Literal["off", "auto"] = Field("auto", description="guess tokens from the text so far while it pays")
    max_draft: int = Field(8, ge=1, le=64, description="guessed tokens per request and step at most")
    constraint_ms: int = Field(2000, ge=1, le=60_000, description="longest time to prepare an answer's constraint")
    constraint_threads: int = Field(1, ge=1, le=64, description="constraints prepared at once")
    constraints_waiting: int = Field(16, ge=0, le=1024, description="constraints waiting to be prepared; more: refused")
    constraints_kept: int = Field(64, ge=1, le=4096, description="prepared constraints that are remembered")
    constraint_symbols: int = Field(50_000, ge=100, le=10_000_000, description="size of a prepared constraint")
    stream_interval_ms: int = Field(
        30, ge=0, le=1000, description="tokens that come sooner share a message; 0: none do"
    )
    stream_messages_per_s: int = Field(
        50, ge=1, le=1_000_000, description="messages of all streams together; with more, more tokens share one"
    )
    stream_longest_ms: int = Field(
        250, ge=0, le=10_000, description="longest time a token waits for others of its stream to share a message"
    )
    publish_blocks: int = Field(1, ge=1, le=1024, description="new key-value blocks copied out after a step at most")
    cache_budget_ms: int = Field(300, ge=0, le=60_000, description="longest wait for cached blocks; then recompute")
    publish_interval_ms: int = Field(
        500, ge=0, le=60_000, description="blocks that come within it after others go to the cache together"
    )
    publish_queue: int = Field(1024, ge=1, le=65_536, description="blocks waiting to be stored in the cache service")

    @field_validator("labels")
    @classmethod
    def _labels_are_pairs(cls, value: str) -> str:
        for pair in filter(None, value.split(",")):
            key, _, word = pair.partition("=")
            if not key or not word or len(pair) > 128:
                raise ValueError(f"{pair!r} is not key=value")
        return value

    @property
    def label_map(self) -> dict[str, str]:
        return dict(pair.split("=", 1) for pair in self.labels.split(",") if pair)

    @property
    def limits(self) -> Limits:
        return Limits(
            max_running=self.max_running,
            max_waiting=self.max_waiting,
            step_rows=self.step_rows,
            logit_rows=self.logit_rows,
            slowdown=self.step_slowdown,
            max_draft=self.max_draft if self.speculation == "auto" else 0,
            publish_blocks=self.publish_blocks,
        )

    @property
    def pace(self) -> Pace:
        return Pace(self.stream_interval_ms / 1000, self.stream_messages_per_s, self.stream_longest_ms / 1000)

    @property
    def constraint_limits(self) -> CompilerLimits:
        return CompilerLimits(max_symbols=self.constraint_symbols, cached=self.constraints_kept)
