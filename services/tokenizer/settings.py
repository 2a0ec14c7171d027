"""What the tokenizer service can be told through `AUTOGLM_*` environment variables."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, field_validator

from services.chassis.model_settings import ModelFetchSettings


class TokenizerSettings(ModelFetchSettings):
    """Limits are per process; each input is bounded by the proto first."""

    models: str = Field(
        "glm-tiny=models/glm-tiny",
        description="comma-separated name=path pairs: a model directory, a .gguf file, or sha256:… from the cache",
    )
    max_tokenizer_file_bytes: int = Field(
        64 << 20, ge=1, le=1 << 30, description="largest tokenizer.json or template read; a file from strangers"
    )
    tokenizer_threads: int = Field(2, ge=1, le=64, description="threads that encode; `tokenizers` releases the GIL")
    tokenizer_max_waiting: int = Field(64, ge=0, le=10_000, description="calls that may wait for such a thread")
    offload_bytes: int = Field(
        4096, ge=0, le=1 << 20, description="texts (and lists of ids) longer than this leave the event loop"
    )
    max_decoded_bytes: int = Field(8 << 20, ge=1, le=15 << 20, description="longest text one Decode may produce")
    template_processes: int = Field(1, ge=1, le=8, description="helper processes that render chat templates")
    template_max_waiting: int = Field(64, ge=0, le=10_000, description="renders that may wait for a helper")
    template_time_ms: int = Field(200, ge=1, le=60_000, description="wall-clock time one render may take")
    template_start_ms: int = Field(
        5_000, ge=100, le=60_000, description="time a helper may take to start, and to compile one template"
    )
    template_memory_bytes: int = Field(
        256 << 20, ge=64 << 20, le=8 << 30, description="address space of a helper process"
    )
    template_output_bytes: int = Field(
        2 << 20, ge=1024, le=2 << 20, description="longest prompt in bytes; the response's own bound is 2 MiB"
    )
    template_date: str = Field(
        "2024-07-26",
        pattern=r"^\d{4}-\d{2}-\d{2}$",
        description="the day `strftime_now` reports: a prompt must not depend on when it was rendered",
    )

    @field_validator("models")
    @classmethod
    def _pairs(cls, value: str) -> str:
        parse_models(value)
        return value

    @property
    def directories(self) -> dict[str, Path]:
        """Model name → directory or .gguf file."""
        return parse_models(self.models)


def parse_models(value: str) -> dict[str, Path]:
    """`name=path,…` as a mapping; ValueError names what is wrong."""
    found: dict[str, Path] = {}
    for pair in value.split(","):
        name, equals, path = (part.strip() for part in pair.partition("="))
        if not (name and equals and path):
            raise ValueError(f"{pair!r} is not name=directory")
        if len(name.encode()) > 128:
            raise ValueError(f"the model name {name[:32]!r}… is longer than 128 bytes")
        if name in found:
            raise ValueError(f"the model {name!r} is named twice")
        found[name] = Path(path)
    if len(found) > 256:
        raise ValueError(f"{len(found)} models, at most 256 are allowed")
    return found
