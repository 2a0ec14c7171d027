"""Settings of an inference worker."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, field_validator

from engine.runtime.loop import Limits
from services.sparse_inference.oip_settings import OipSettings


class WorkerSettings(OipSettings):
    """AUTOGLM_* of `python -m services.sparse_inference`."""

    model_name: str = Field("glm-tiny", min_length=1, max_length=128, description="public name of the model")
    model_dir: Path = Field(
        Path("models/glm-tiny"), description="checkpoint in the Hugging Face layout, or an ONNX file"
    )
    labels: str = Field("version=v1", max_length=1024, description="k=v,k2=v2 as the pod's labels would be")
    advertise: str = Field("", max_length=64, description="ip:port Envoy reaches the worker by; empty: bind and port")
    max_weights_mib: int = Field(65_536, ge=1, le=1 << 30, description="float32 weights in memory; larger is refused")
    max_running: int = Field(16, ge=1, le=1024, description="requests computed at once")
    max_waiting: int = Field(64, ge=0, le=65_536, description="requests queued; further ones are refused")
    kv_capacity_mib: int = Field(256, ge=1, le=1 << 20, description="key-value memory of running requests")
    prefix_store_mib: int = Field(128, ge=1, le=1 << 20, description="key-value blocks kept after their request")
    step_rows: int = Field(64, ge=16, le=8192, description="rows of one step: decodes first, prefill fills up")
    cache_budget_ms: int = Field(300, ge=0, le=60_000, description="longest wait for cached blocks; then recompute")
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
        return Limits(self.max_running, self.max_waiting, self.kv_capacity_mib << 20, self.step_rows)
