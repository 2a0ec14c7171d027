"""`python -m services.chassis.probe [SERVICE] [HOST:PORT]` asks a member of the mesh for its health: status 0 or 1.

For what cannot speak grpc.health.v1 itself, such as a health check of Docker Compose. Without SERVICE it asks whether
the process is alive, with one whether that gRPC service takes calls.
"""

from __future__ import annotations

import os
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

TIMEOUT_S = 2.0


def is_serving(address: str, service: str = "", timeout_s: float = TIMEOUT_S) -> bool:
    """Whether `service` at `address` says SERVING within the time; an answer that does not come is a no."""
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=timeout_s)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def main(arguments: list[str]) -> int:
    service = arguments[0] if arguments else ""
    address = arguments[1] if len(arguments) > 1 else f"127.0.0.1:{os.environ.get('AUTOGLM_GRPC_PORT', '50051')}"
    return 0 if is_serving(address, service) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
