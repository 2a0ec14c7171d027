"""The scheduler's settings: every bound it keeps, read from AUTOGLM_* by `__main__`."""

from __future__ import annotations

from pydantic import Field

from services.chassis.settings import ServiceSettings


class SchedulerSettings(ServiceSettings):
    """Bounds, clocks and paths. The defaults suit one laptop and a handful of workers."""

    max_concurrent_rpcs: int = Field(
        4096, ge=1, le=100_000, description="one ext_proc stream per request in flight, and one lease per worker"
    )
    max_replicas: int = Field(256, ge=1, le=4096, description="leases at once; a further worker is refused")
    max_prefix_blocks: int = Field(
        65_536, ge=0, le=10_000_000, description="block hashes kept per replica (~120 bytes each); oldest go first"
    )
    report_interval_ms: int = Field(200, ge=10, le=60_000, description="how often workers are asked to report")
    lease_timeout_ms: int = Field(
        5_000, ge=50, le=600_000, description="a lease without any report for so long is ended: the peer is gone"
    )
    policy_path: str = Field("", description="JSON policy file; empty takes the built-in policy")
    max_first_frame_bytes: int = Field(
        2 << 20, ge=1024, le=1 << 30, description="a longer first message is placed by load alone, unread"
    )
    asks_for_body: bool = Field(
        True, description="asks Envoy for the body where its mode is NONE; needs allow_mode_override there"
    )
    max_hashed_tokens: int = Field(
        32_768, ge=0, le=1 << 20, description="prompt tokens matched against prefixes (~0.1 µs each); the rest is not"
    )
    body_chunk_bytes: int = Field(
        62_000, ge=1024, le=65_536, description="largest body part sent back to Envoy; some Envoys refuse 64 KiB"
    )
    saturated_retry_after_ms: int = Field(250, ge=1, le=60_000, description="told to callers that are shed")
    max_decisions: int = Field(4096, ge=1, le=1_000_000, description="decisions kept in memory, newest")
    decision_log: str = Field("", description="file the decisions are appended to; empty keeps them in memory only")
    decision_log_bytes: int = Field(
        16 << 20, ge=4096, le=1 << 34, description="size at which the log is closed, compressed and begun anew"
    )
    decision_log_segments: int = Field(8, ge=1, le=10_000, description="compressed logs kept beside the open one")
    decision_log_queue: int = Field(4096, ge=1, le=1_000_000, description="records that wait for the disk at most")
