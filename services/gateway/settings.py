"""What can be set about the gateway. Read once by `__main__`; see `services.chassis.settings` for the shared part."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, SecretStr

from services.chassis.settings import Port, ServiceSettings


class Settings(ServiceSettings):
    """Every buffer and every wait of the gateway has its bound here."""

    rest_port: Port = Field(8000, description="port of the OpenAI-style REST API; 0 takes a free one and prints it")
    tenant: str = Field("public", min_length=1, max_length=64, description="who asks when the ingress names no tenant")

    max_in_flight: int = Field(256, ge=1, le=100_000, description="choices generated at once; more are refused")
    retry_after_s: float = Field(1.0, ge=0, le=3600, description="when a refused caller should come back")
    queue_events: int = Field(64, ge=1, le=65_536, description="events waiting for a slow client, per request")
    default_deadline_s: float = Field(600.0, gt=0, le=86_400, description="for callers that set no deadline")
    peer_timeout_s: float = Field(10.0, gt=0, le=600, description="longest wait for one unary call to a peer")
    health_timeout_s: float = Field(2.0, gt=0, le=60, description="longest wait for a peer when asked for health")
    model_info_ttl_s: float = Field(3.0, ge=0, le=3600, description="how long what a worker said of its model is used")
    asked_header_bytes: int = Field(
        4096, ge=0, le=16_384, description="a prompt of so many bytes is told to the picker in a header; 0: never"
    )
    generate_retries: int = Field(1, ge=0, le=3, description="new attempts when a worker fails before its first token")

    token_budgets: Path | None = Field(None, description="TOML file of tokens per minute by tenant; unset: no limits")
    token_budgets_watch_s: float = Field(1.0, gt=0, le=3600, description="how often that file is looked at")
    budget_store_url: SecretStr = Field(
        SecretStr(""), description="Valkey or Redis that all gateways share, such as redis://host:6379/1; empty: none"
    )
    budget_store_timeout_ms: int = Field(50, ge=1, le=10_000, description="longest a request waits for that store")
    budget_store_connections: int = Field(16, ge=1, le=1024, description="connections to it")
    budget_store_share: float = Field(
        1.0, gt=0, le=1, description="part of each budget this gateway grants by itself while the store is away"
    )
    budget_tenants: int = Field(10_000, ge=1, le=1_000_000, description="tenants whose use is remembered in memory")

    default_max_tokens: int = Field(512, ge=1, le=131_072, description="tokens per choice when the caller names none")
    max_prompts: int = Field(8, ge=1, le=8, description="prompts in one completion request")
    max_prompt_bytes: int = Field(1 << 20, ge=1, le=1 << 20, description="UTF-8 of all text of a request together")
    parse_special_tokens: bool = Field(False, description="read special tokens in the text of plain completions")
    vocabularies: int = Field(4, ge=1, le=64, description="vocabularies kept to turn ids into text, a few MB each")

    max_body_bytes: int = Field(8 << 20, ge=1024, le=256 << 20, description="largest REST request body")
    body_timeout_s: float = Field(30.0, gt=0, le=600, description="longest time a REST body may take to arrive")
    rest_max_connections: int = Field(1024, ge=1, le=100_000, description="REST connections; more are refused")
    rest_keep_alive_s: int = Field(75, ge=1, le=3600, description="how long an idle REST connection is kept")
