"""One real Envoy in front of nothing, for access tests: any number of sidecar listeners, each under its own policy.

What passes a sidecar meets a listener of the same Envoy that answers 200 to everything; all requests of one caller to
one listener share a connection. So thousands of calls take seconds.
"""

import asyncio
import ssl
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from socket import create_connection
from typing import Any, Literal, Self

from services.mesh.identity import Authority
from services.mesh.identity.files import write_certificate, write_root
from services.mesh.policy import Policy
from services.mesh.registry import Workload
from services.mesh.translate import NodeSettings, Snapshot
from services.mesh.translate.access import access_filters
from services.mesh.translate.bootstrap import bootstrap
from services.mesh.translate.inbound import inbound_clusters, inbound_listeners
from services.mesh.translate.names import LISTENER, TYPE_URL, socket_address
from services.mesh.translate.node import InboundPort, Sidecar
from tests.fakes.envoy_process import EnvoyProcess, free_port, node_settings

Outcome = Literal["reached", "denied", "refused", "closed"]
"""The service; 403; another answer of the proxy's; no answer at all."""
TENANT = "x-autoglm-tenant"


@dataclass(frozen=True, slots=True)
class Asked:
    """One request, and what else is in it."""

    verb: str
    path: str
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: str = ""

    @property
    def outcome(self) -> Outcome:
        if "x-reached" in self.headers:
            return "reached"
        return "denied" if self.status == 403 else "closed" if not self.status else "refused"


class AccessWorld:
    """Add listeners, then `start`; afterwards `ask`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.authority = Authority.create(timedelta(days=1), datetime.now(UTC))
        self.identities = directory / "identity"
        self.node: NodeSettings = replace(node_settings(directory), identities=self.identities)
        self._root = directory / "root.pem"
        self._service = free_port()
        self._listeners: list[Any] = [self._answering()]
        self._clusters: list[Any] = []
        self._served: set[str] = set()
        self._contexts: dict[tuple[str, bytes], ssl.SSLContext] = {}
        self._runner = asyncio.Runner()
        self._envoy: EnvoyProcess | None = None
        self._root.write_bytes(self.authority.root)
        write_root(self.identities, self.authority.root)

    def sidecar(self, policy: Policy, workload: Workload, number: int = 50051) -> int:
        """The product's own inbound listener for a process of this workload; returns its port."""
        port = free_port()
        owner = replace(workload, name=f"{workload.name}-{port}")
        sidecar = Sidecar(owner, workload.name, (InboundPort(number, "grpc", port, self._service),))
        if workload.service_account not in self._served:
            self._served.add(workload.service_account)
            issued = self.authority.issue(workload.identity, timedelta(hours=1), datetime.now(UTC))
            write_certificate(self.identities, workload.service_account, issued)
        node = replace(self.node, sidecars=(sidecar,))
        self._listeners += inbound_listeners(policy, node)
        self._clusters += inbound_clusters(node)
        return port

    def door(self, policy: Policy, workload: Workload) -> int:
        """A listener without TLS, as the ingress is, with the access filters of the workload; returns its port."""
        port = free_port()
        self._listeners.append(_direct(f"door-{port}", port, access_filters(policy, workload, chooses_routes=True)))
        return port

    def snapshot(self) -> Snapshot:
        """All of it as one configuration."""
        return Snapshot(bootstrap(self.node), tuple(self._clusters), tuple(self._listeners), (), ())

    def start(self) -> Self:
        self._envoy = EnvoyProcess(self.snapshot(), self.node)
        self._runner.run(self._envoy.__aenter__())
        return self

    def stop(self) -> None:
        if self._envoy is not None:
            self._runner.run(self._envoy.__aexit__())
        self._runner.close()

    def caller(
        self, identity: str, authority: Authority | None = None, lifetime: timedelta | None = None
    ) -> ssl.SSLContext:
        """How somebody with a certificate in this name connects; signed by the mesh's authority unless another."""
        signer = authority or self.authority
        key = (identity, signer.root)
        if key not in self._contexts or lifetime is not None:
            issued = signer.issue(identity, lifetime or timedelta(hours=1), datetime.now(UTC))
            path = self.directory / f"caller-{len(self._contexts)}.pem"
            path.write_bytes(issued.chain + issued.key)
            context = self.anonymous()
            context.load_cert_chain(path)
            self._contexts[key] = context
        return self._contexts[key]

    def anonymous(self) -> ssl.SSLContext:
        """TLS without a certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False  # SPIFFE names are no host names; who the callee is, is not asked here
        context.load_verify_locations(self._root)
        return context

    def ask(self, port: int, tls: ssl.SSLContext | None, requests: Sequence[Asked]) -> list[Reply]:
        """The replies in order; status 0 for each that did not come."""
        replies: list[Reply] = []
        try:
            with create_connection(("127.0.0.1", port), timeout=20) as plain:
                connection = tls.wrap_socket(plain) if tls is not None else plain
                with connection, connection.makefile("rb") as stream:
                    for item in requests:
                        connection.sendall(_written(item))
                        replies.append(_reply(stream, item.verb))
        except (OSError, EOFError):
            pass
        return replies + [Reply(0)] * (len(requests) - len(replies))

    def _answering(self) -> Any:
        return _direct("service", self._service, [])


def _direct(name: str, port: int, filters: Iterable[Any]) -> Any:
    router = {
        "name": "envoy.filters.http.router",
        "typed_config": {"@type": TYPE_URL + "envoy.extensions.filters.http.router.v3.Router"},
    }
    route = {
        "match": {"prefix": "/"},
        "direct_response": {"status": 200, "body": {"inline_string": "reached"}},
        "response_headers_to_add": [
            {"header": {"key": "x-reached", "value": "yes"}},
            {"header": {"key": "x-tenant-seen", "value": f"%REQ({TENANT})%"}},
            {"header": {"key": "x-token-seen", "value": "%REQ(authorization)%"}},
        ],
    }
    manager = {
        "@type": TYPE_URL + "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": name,
        "normalize_path": True,
        "http_filters": [*filters, router],
        "route_config": {"name": name, "virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
    }
    network = {"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}
    return {
        "@type": LISTENER,
        "name": name,
        "address": socket_address("127.0.0.1", port),
        "filter_chains": [{"filters": [network]}],
    }


def _written(item: Asked) -> bytes:
    headers = "".join(f"{name}: {value}\r\n" for name, value in item.headers)
    return f"{item.verb} {item.path} HTTP/1.1\r\nhost: mesh\r\n{headers}content-length: 0\r\n\r\n".encode()


def _reply(stream: Any, verb: str) -> Reply:
    first = stream.readline().decode()
    if not first.startswith("HTTP/1.1 "):
        raise EOFError(first)
    headers: dict[str, str] = {}
    while (line := stream.readline().decode().strip()) != "":
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    length = int(headers.get("content-length", "0"))
    body = stream.read(length).decode() if verb != "HEAD" else ""
    return Reply(int(first.split()[1]), headers, body)
