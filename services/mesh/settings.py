"""Settings of the local mesh, read once from the environment by `python -m services.mesh`.

Fixed ports are those a person types; everything behind Envoy takes a free one.
"""

from __future__ import annotations

from pathlib import Path

from autoglm.manifest import is_digest
from pydantic import Field

from services.chassis.settings import Port, ServiceSettings

BUNDLED_MODEL = Path("models/glm-tiny")


class MeshSettings(ServiceSettings):
    """Where the mesh listens, what it starts, and how patient it is."""

    run_dir: Path = Field(Path(".run"), description="pid lock, state, logs and generated Envoy configuration")
    policy_dir: Path = Field(Path("istio/base"), description="Istio YAML, the only source of traffic policy")
    topology: Path = Field(Path("deploy/local/mesh.yaml"), description="which processes to start")
    replicas: str = Field(
        "", max_length=1024, description="overrides replica counts, such as sparse-inference/canary=1"
    )
    model_dir: Path = Field(
        BUNDLED_MODEL,
        description="the model to serve: a directory (Hugging Face layout), a .gguf file, or sha256:… from the cache",
    )
    cache_artifact_url: str = Field(
        "", description="the cache service's object store, from which a model by digest may come; empty: none"
    )
    model_name: str = Field(
        "",
        pattern=r"^[A-Za-z0-9._:/@+-]{0,128}$",
        description="its public name; empty: the name of the directory or file",
    )
    precision: str = Field("int8", description="number format of its weights: bf16, int8, int4 or int4-head4")
    threads: int | None = Field(
        None, ge=0, le=1024, description="threads of a worker, 0: all CPUs; unset: 1 for glm-tiny's two, else 0"
    )

    ingress_port: Port = Field(8080, description="Envoy's port for clients; 0 takes a free one")
    admin_port: Port = Field(15000, description="Envoy's admin page; 0 takes a free one")
    otlp_port: Port = Field(4317, description="the trace sink's OTLP/gRPC port; 0 takes a free one")
    otlp_forward: str = Field("", description="host:port of another OTLP/gRPC collector that gets every span too")

    ca_dir: Path | None = Field(
        None, description="the mesh's certificate authority; meshes that share it trust each other; unset: in run_dir"
    )
    issuer_dir: Path | None = Field(
        None,
        description="the local token issuer's key; meshes that share it take each other's tokens; unset: in run_dir",
    )
    certificate_hours: float = Field(24.0, gt=0, le=8760, description="life of a certificate; renewed at half of it")
    authority_days: float = Field(365.0, gt=0, le=36500, description="life of the authority, made at the first start")

    cloud: str = Field(
        "", pattern=r"^([a-z]([-a-z0-9]{0,30}[a-z0-9])?)?$", description="name of this cloud among others; empty: alone"
    )
    locality: str = Field("", max_length=128, description="region/zone/subzone of this mesh")
    peers: str = Field("", max_length=1024, description="other clouds to hear from: name=host:port,…")
    eastwest_gateways: str = Field("", max_length=1024, description="ways into the other clouds: name=host:port,…")
    federation_port: Port = Field(0, description="where the other clouds hear what is ready here")
    eastwest_port: Port = Field(0, description="the way in for the other clouds' requests")
    federation_heartbeat_ms: int = Field(250, ge=20, le=60_000, description="how often the others hear of us")
    federation_stale_ms: int = Field(1000, ge=100, le=600_000, description="a cloud not heard of so long is dropped")
    ping_interval_ms: int = Field(1000, ge=100, le=600_000, description="among clouds: how often a connection is tried")
    ping_timeout_ms: int = Field(1200, ge=50, le=600_000, description="and how long until a silent one is given up")
    federation_ramp_s: float = Field(10.0, ge=0, le=3600, description="time to the full share of one that comes back")

    start_timeout_s: float = Field(60.0, gt=0, le=3600, description="how long one process may take to be ready")
    start_attempts: int = Field(3, ge=1, le=100, description="a process that dies this often before its first ready")
    backoff_first_s: float = Field(0.2, gt=0, le=60, description="pause before the first restart; doubles each time")
    backoff_cap_s: float = Field(10.0, gt=0, le=3600, description="longest pause between restarts")
    stable_s: float = Field(30.0, gt=0, le=3600, description="a run this long makes the next pause short again")
    drain_grace_s: float = Field(10.0, ge=0, le=3600, description="how long running calls may finish on stop")
    log_bytes: int = Field(4 << 20, ge=4096, le=1 << 30, description="size of one log file before it is rotated once")
    watch_ms: int = Field(100, ge=10, le=10_000, description="how often the policy folder is looked at")
    accept_timeout_s: float = Field(2.0, gt=0, le=60, description="how long Envoy may take to accept a change")

    @property
    def is_own_model(self) -> bool:
        """Whether the model is another than the one in the repository."""
        return self.is_by_digest or self.model_dir.absolute() != BUNDLED_MODEL.absolute()

    @property
    def is_by_digest(self) -> bool:
        """Whether the model is named by its digest and comes from the cache."""
        return is_digest(str(self.model_dir))

    @property
    def model_place(self) -> str:
        """The model as services are told of it: an absolute path, or its digest."""
        return str(self.model_dir) if self.is_by_digest else str(self.model_dir.absolute())


def addresses(text: str, variable: str) -> dict[str, tuple[str, int]]:
    """`name=host:port,…` as a mapping. Raises ValueError naming the setting."""
    found: dict[str, tuple[str, int]] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, place = item.partition("=")
        host, _, port = place.rpartition(":")
        if not name or not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise ValueError(f"{variable}: {item!r} is not name=host:port")
        found[name] = (host, int(port))
    return found


FIXED_PORTS: tuple[tuple[str, str], ...] = (
    ("ingress_port", "clients connect here"),
    ("admin_port", "Envoy's admin page"),
    ("otlp_port", "traces"),
)
"""Settings fields that name a port, with what each is for."""
