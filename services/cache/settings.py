"""What the cache service can be told through `AUTOGLM_*` environment variables."""

from __future__ import annotations

from pydantic import Field, ValidationInfo, field_validator

from services.cache import object_store
from services.chassis.settings import ServiceSettings

MIB = 1 << 20


class CacheSettings(ServiceSettings):
    """Every tier is bounded in bytes; a bound of 0 switches the tier off."""

    cache_memory_bytes: int = Field(256 * MIB, ge=0, le=1 << 44, description="memory for blocks, bookkeeping included")
    cache_disk_bytes: int = Field(1024 * MIB, ge=0, le=1 << 50, description="disk space for blocks, in whole pages")
    cache_artifact_bytes: int = Field(4096 * MIB, ge=0, le=1 << 50, description="disk space for artifacts")
    cache_directory: str = Field(".run/cache", description="where files go; empty keeps nothing on disk")
    cache_max_block_bytes: int = Field(8 * MIB, ge=1, le=8 * MIB, description="largest block stored")
    cache_max_artifact_bytes: int = Field(2048 * MIB, ge=1, le=1 << 40, description="largest artifact stored")
    cache_scope_share: float = Field(
        0.75, gt=0, le=1, description="part of a tier that one scope (variant and tenant) may fill"
    )
    cache_max_blocks_per_put: int = Field(8192, ge=1, le=1 << 20, description="blocks that one Put may send")
    cache_links: int = Field(65_536, ge=0, le=1 << 24, description="parent links remembered for blocks not stored yet")
    cache_io_threads: int = Field(2, ge=1, le=64, description="threads that read and write files")
    cache_io_waiting: int = Field(128, ge=0, le=100_000, description="file operations that may wait for a thread")
    cache_disk_retry_s: float = Field(1.0, gt=0, le=3600, description="pause before a failed disk is written to again")
    cache_spill_s: float = Field(5.0, ge=0, le=600, description="time to move memory to disk after a drain; 0: none")
    cache_artifact_url: str = Field(
        "",
        max_length=1024,
        description="object store that keeps artifacts for several caches: s3://bucket/prefix, gs://…, az://…, "
        "file:///folder; empty: none",
    )
    cache_artifact_timeout_ms: int = Field(
        10_000, ge=10, le=600_000, description="longest one request to the object store may take: 4 MiB at most"
    )
    cache_artifact_connect_ms: int = Field(2_000, ge=10, le=60_000, description="longest a connection to it may take")
    cache_artifact_downloads: int = Field(4, ge=1, le=64, description="artifacts fetched from it at a time; 4 MiB each")
    cache_artifact_allow_http: bool = Field(
        False, description="speak to it without TLS, as to a MinIO beside the cache"
    )
    redis_url: str = Field("", description="Valkey or Redis as the last tier, such as redis://host:6379/0; empty: none")
    redis_timeout_ms: int = Field(20, ge=1, le=10_000, description="longest a block waits for Redis")
    redis_ttl_s: int = Field(86_400, ge=1, le=1 << 30, description="how long Redis keeps a block")
    redis_connections: int = Field(8, ge=1, le=1024, description="connections to Redis")

    @field_validator("cache_artifact_url")
    @classmethod
    def _names_a_store(cls, value: str, info: ValidationInfo) -> str:
        if value:
            object_store.check(value)
            if not info.data.get("cache_directory"):
                raise ValueError("needs AUTOGLM_CACHE_DIRECTORY: artifacts are proved on disk before they are served")
        return value
