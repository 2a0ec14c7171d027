"""What a program that needs a model's files can be told about fetching them by digest."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from services.chassis.settings import ServiceSettings


class ModelFetchSettings(ServiceSettings):
    """Fields that the settings of workers and tokenizers inherit."""

    cache_dir: Path | None = Field(
        None,
        description="models fetched by digest, and what can be computed again; unset: autoglm in the user's caches",
    )
    model_fetch_patience_s: float = Field(
        45.0, gt=0, le=86_400, description="how long nothing of a model may come from the cache before it is given up"
    )
    model_fetch_mib: int = Field(65_536, ge=1, le=1 << 24, description="largest model fetched by digest")
