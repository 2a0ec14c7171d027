"""Settings of the local mesh, read once from the environment by `python -m services.mesh`.

Fixed ports are those a person types; everything behind Envoy takes a free one.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from services.chassis.settings import Port, ServiceSettings


class MeshSettings(ServiceSettings):
    """Where the mesh listens, what it starts, and how patient it is."""

    run_dir: Path = Field(Path(".run"), description="pid lock, state, logs and generated Envoy configuration")
    policy_dir: Path = Field(Path("istio/base"), description="Istio YAML, the only source of traffic policy")
    topology: Path = Field(Path("deploy/local/mesh.yaml"), description="which processes to start")
    replicas: str = Field(
        "", max_length=1024, description="overrides replica counts, such as sparse-inference/canary=1"
    )
    model: str = Field("glm-tiny", min_length=1, max_length=128, description="model the first request asks for")

    ingress_port: Port = Field(8080, description="Envoy's port for clients; 0 takes a free one")
    outbound_port: Port = Field(15001, description="Envoy's port for the services' own calls; 0 takes a free one")
    admin_port: Port = Field(15000, description="Envoy's admin page; 0 takes a free one")
    otlp_port: Port = Field(4317, description="the trace sink's OTLP/gRPC port; 0 takes a free one")
    otlp_forward: str = Field("", description="host:port of another OTLP/gRPC collector that gets every span too")

    start_timeout_s: float = Field(60.0, gt=0, le=3600, description="how long one process may take to be ready")
    start_attempts: int = Field(3, ge=1, le=100, description="a process that dies this often before its first ready")
    backoff_first_s: float = Field(0.2, gt=0, le=60, description="pause before the first restart; doubles each time")
    backoff_cap_s: float = Field(10.0, gt=0, le=3600, description="longest pause between restarts")
    stable_s: float = Field(30.0, gt=0, le=3600, description="a run this long makes the next pause short again")
    drain_grace_s: float = Field(10.0, ge=0, le=3600, description="how long running calls may finish on stop")
    log_bytes: int = Field(4 << 20, ge=4096, le=1 << 30, description="size of one log file before it is rotated once")
    watch_ms: int = Field(100, ge=10, le=10_000, description="how often the policy folder is looked at")
    accept_timeout_s: float = Field(2.0, gt=0, le=60, description="how long Envoy may take to accept a change")


FIXED_PORTS: tuple[tuple[str, str], ...] = (
    ("ingress_port", "clients connect here"),
    ("outbound_port", "the services' own calls"),
    ("admin_port", "Envoy's admin page"),
    ("otlp_port", "traces"),
)
"""Settings fields that name a port, with what each is for."""
