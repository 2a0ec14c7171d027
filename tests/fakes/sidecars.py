"""A little mesh for tests of identity: one service behind its sidecar, one caller, a fresh authority."""

import socket
import ssl
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509

from services.mesh.identity import Authority, Certificate, Identities, Terms
from services.mesh.registry import Endpoint, Registry, Service, ServicePort, Workload, spiffe_id
from services.mesh.translate import Caller, InboundPort, NodeSettings, Sidecar
from tests.fakes.envoy_process import free_port, node_settings

SERVICE = "cache"
HOST = f"{SERVICE}.autoglm.svc.cluster.local"
CALLER = "sparse-inference"
GRPC = ServicePort("grpc", 50051, "grpc")
TERMS = Terms()
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
"""How an HTTP/2 client begins: the preface and an empty SETTINGS frame."""


@dataclass(frozen=True)
class Sidecars:
    """`cache` behind a sidecar, called by `sparse-inference`; `identities` can rotate."""

    node: NodeSettings
    registry: Registry
    authority: Authority
    identities: Identities

    @property
    def outbound(self) -> int:
        """Where the caller's calls go."""
        return self.node.callers[0].port

    @property
    def inbound(self) -> int:
        """Where the sidecar listens."""
        return self.node.sidecars[0].ports[0].listens


def sidecars(directory: Path, process_port: int, service_account: str = SERVICE) -> Sidecars:
    """`service_account` is whose certificate the sidecar shows."""
    inbound, home = free_port(), directory / "identity"
    authority = Authority.create(TERMS.authority, datetime.now(UTC))
    accounts = {SERVICE, CALLER, "ingress", service_account}
    identities = Identities(home, authority, "autoglm", accounts, TERMS, lambda: None, lambda: 0.5)
    identities.prepare()
    workload = Workload(f"{SERVICE}-0", "autoglm", service_account, {"app": SERVICE})
    node = replace(
        node_settings(directory),
        callers=(Caller(CALLER, free_port(), frozenset({SERVICE})),),
        sidecars=(Sidecar(workload, SERVICE, (InboundPort(50051, "grpc", inbound, process_port),)),),
        identities=home,
    )
    endpoint = Endpoint("127.0.0.1", inbound, {"app": SERVICE}, has_sidecar=True)
    registry = Registry((Service(SERVICE, "autoglm", (GRPC,), {"grpc": (endpoint,)}, {"app": SERVICE}),))
    return Sidecars(node, registry, authority, identities)


def certificate(
    authority: Authority, account: str = CALLER, lifetime: timedelta = timedelta(hours=1), age: timedelta = timedelta()
) -> Certificate:
    """One for a client of the test's own; with an `age` above its lifetime it has expired."""
    return authority.issue(spiffe_id("autoglm", account), lifetime, datetime.now(UTC) - age)


def client_context(
    directory: Path, trusted: Authority, shown: Certificate | None, alpn: tuple[str, ...] = ("istio", "h2")
) -> ssl.SSLContext:
    """TLS as a mesh member speaks it, from Python: names are not checked here, that is Envoy's part."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(cadata=trusted.root.decode())
    context.set_alpn_protocols(list(alpn))
    if shown is not None:
        chain, key = directory / "client-chain.pem", directory / "client-key.pem"
        chain.write_bytes(shown.chain)
        key.write_bytes(shown.key)
        context.load_cert_chain(chain, key)
    return context


def connect(port: int, context: ssl.SSLContext) -> str:
    """Opens a connection and waits for the server's first HTTP/2 frame; the serial of the certificate it showed.

    In TLS 1.3 a server that refuses the client says so only after the handshake, so a frame is the proof of entry.
    Raises OSError where the connection is refused.
    """
    with socket.create_connection(("127.0.0.1", port), timeout=10) as plain, context.wrap_socket(plain) as secure:
        secure.sendall(PREFACE)
        if not secure.recv(9):
            raise ConnectionResetError("closed without a word")
        shown = secure.getpeercert(binary_form=True)
        assert shown is not None
        return f"{x509.load_der_x509_certificate(shown).serial_number:x}"
