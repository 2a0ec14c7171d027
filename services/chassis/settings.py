"""Settings every program of the mesh shares, read once from the environment by its `__main__`.

A program subclasses `ServiceSettings`, adds its own fields and calls `read(Settings)`. Names are `AUTOGLM_<FIELD>`.
All mistakes are reported together and the process exits with status 2.
"""

from __future__ import annotations

import sys
from typing import Annotated, TypeVar

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

Port = Annotated[int, Field(ge=0, le=65535)]


class ServiceSettings(BaseSettings):
    """What any member of the mesh needs to know."""

    model_config = SettingsConfigDict(env_prefix="AUTOGLM_", frozen=True, extra="ignore")

    instance: str = Field("local", min_length=1, max_length=64, description="name of this process, unique in the mesh")
    bind: str = Field("127.0.0.1", description="address to listen on")
    grpc_port: Port = Field(0, description="gRPC port; 0 takes a free one and prints it")
    metrics_port: Port = Field(0, description="port of the Prometheus page; 0 takes a free one and prints it")
    mesh_address: str = Field(
        "127.0.0.1:15001",
        description="Envoy's outbound listener, through which all calls go; empty: each service is called by its own "
        "name, as in Kubernetes, where the sidecar takes the call on its way",
    )
    service_port: int = Field(50051, ge=1, le=65535, description="port of every service, where mesh_address is empty")
    namespace: str = Field("autoglm", description="Kubernetes namespace, part of every host name")
    otlp_endpoint: str = Field("", description="host:port of an OTLP/gRPC collector; empty sends no traces")
    log_level: str = Field("INFO", pattern="^(DEBUG|INFO|WARNING|ERROR)$")
    drain_grace_s: float = Field(30.0, ge=0, le=3600, description="how long running calls may finish after SIGTERM")
    hop_margin_ms: int = Field(5, ge=0, le=10_000, description="taken off the deadline at each hop, for the way back")
    max_concurrent_rpcs: int = Field(512, ge=1, le=100_000, description="more are refused with RESOURCE_EXHAUSTED")
    max_message_bytes: int = Field(16 << 20, ge=1024, le=1 << 30, description="largest message sent or received")

    def host(self, service: str) -> str:
        """The name Envoy routes by, as Kubernetes would spell it."""
        return f"{service}.{self.namespace}.svc.cluster.local"

    def target(self, service: str) -> str:
        """What to dial for `service`."""
        return self.mesh_address or f"dns:///{self.host(service)}:{self.service_port}"


SettingsT = TypeVar("SettingsT", bound=ServiceSettings)


def read(kind: type[SettingsT]) -> SettingsT:
    """The program's settings, or a list of everything wrong with them on stderr and exit status 2."""
    try:
        return kind()
    except ValidationError as error:
        for problem in error.errors():
            name = "AUTOGLM_" + "_".join(str(part) for part in problem["loc"]).upper()
            print(f"{name}: {problem['msg']} (got {problem['input']!r})", file=sys.stderr)
        raise SystemExit(2) from None
