"""Where a client connects and what every call of it carries: target, TLS, metadata, timeout.

Both clients make one `Connection` from their arguments and the environment; the channel itself is theirs.
"""

from __future__ import annotations

import ipaddress
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata as distributions

import grpc

from autoglm.errors import InvalidRequestError

DEFAULT_TARGET = "127.0.0.1:8080"
DEFAULT_TIMEOUT_S = 300.0
"""A CPU answers in minutes what a GPU answers in seconds; still, no call should hang for ever by default."""
DEFAULT_MAX_ANSWER_BYTES = 64 * 2**20
"""Most bytes of one answer kept in memory, log-probabilities included."""

_LONGEST_TIMEOUT_S = 366 * 86400.0
_KEY = re.compile(r"[0-9a-z_.-]{1,256}")


@dataclass(frozen=True, slots=True)
class Tls:
    """TLS to the ingress. All fields are optional: `Tls()` verifies against gRPC's own root certificates."""

    ca_pem: bytes | None = None
    """Roots to trust instead, PEM."""
    cert_pem: bytes | None = field(default=None, repr=False)
    """Client certificate chain for mutual TLS, PEM; needs `key_pem`."""
    key_pem: bytes | None = field(default=None, repr=False)
    server_name: str | None = None
    """Name expected in the server's certificate, when it is not the target's host."""


@dataclass(frozen=True, slots=True)
class Connection:
    """The settings of one client, checked."""

    target: str
    tls: Tls | None
    metadata: tuple[tuple[str, str], ...] = field(repr=False)
    timeout_s: float | None
    model: str | None
    max_answer_bytes: int

    def credentials(self) -> grpc.ChannelCredentials | None:
        """Channel credentials; None for plain text."""
        if self.tls is None:
            return None
        return grpc.ssl_channel_credentials(self.tls.ca_pem, self.tls.key_pem, self.tls.cert_pem)

    def options(self) -> list[tuple[str, str | int]]:
        """Channel options: quick reconnects, dead peers noticed, no retries but the mesh's own."""
        options: list[tuple[str, str | int]] = [
            ("grpc.primary_user_agent", f"autoglm-python/{version()}"),
            ("grpc.service_config_disable_resolution", 1),
            ("grpc.initial_reconnect_backoff_ms", 200),
            # Despite its name also how long one attempt to connect may take, far roads and busy doors included.
            ("grpc.min_reconnect_backoff_ms", 5_000),
            ("grpc.max_reconnect_backoff_ms", 5_000),
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 10_000),
        ]
        if _is_loopback(self.target):
            options.append(("grpc.enable_http_proxy", 0))
        if self.tls is not None and self.tls.server_name:
            options.append(("grpc.ssl_target_name_override", self.tls.server_name))
        return options

    def metadata_of(self, extra: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
        """Metadata of one call: the client's and the call's own."""
        return self.metadata + _checked_metadata(extra.items())


def connection(
    target: str | None,
    tls: Tls | bool,
    token: str | None,
    metadata: Mapping[str, str] | None,
    timeout: float | None,
    model: str | None,
    max_answer_bytes: int,
    environ: Mapping[str, str] = os.environ,
) -> Connection:
    """Checks the arguments of a client; what is not given comes from AUTOGLM_TARGET, AUTOGLM_TOKEN, AUTOGLM_MODEL."""
    address = target or environ.get("AUTOGLM_TARGET") or DEFAULT_TARGET
    if address.startswith("https://"):
        address, tls = _host_and_port(address.removeprefix("https://"), 443), tls or True
    elif address.startswith("http://"):
        if tls:
            raise InvalidRequestError(f"target {address} is plain text, but TLS was asked for: write https://")
        address = _host_and_port(address.removeprefix("http://"), 80)
    elif ":" not in address and not tls:  # gRPC would quietly take port 443
        raise InvalidRequestError(f"target {address!r}: give host:port, or https://{address} for TLS on port 443")
    bearer = token or environ.get("AUTOGLM_TOKEN")
    pairs = list((metadata or {}).items())
    if bearer:
        pairs.append(("authorization", f"Bearer {bearer}"))
    return Connection(
        target=address,
        tls=(Tls() if tls is True else tls) or None,
        metadata=_checked_metadata(pairs),
        timeout_s=check_timeout(timeout),
        model=model or environ.get("AUTOGLM_MODEL") or None,
        max_answer_bytes=max_answer_bytes,
    )


def check_timeout(timeout: float | None) -> float | None:
    """Refuses what gRPC would take for "already over" or overflow on."""
    if timeout is not None and not (math.isfinite(timeout) and 0 < timeout <= _LONGEST_TIMEOUT_S):
        raise InvalidRequestError(f"timeout={timeout}: seconds above 0 and up to a year, or None for no deadline")
    return timeout


def _checked_metadata(pairs: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    checked = tuple((key.lower(), value) for key, value in pairs)
    for key, value in checked:
        if not _KEY.fullmatch(key) or key.endswith("-bin") or key.startswith("grpc-"):
            raise InvalidRequestError(f"metadata key {key!r}: letters, digits, '_', '.', '-'; not grpc-…, not …-bin")
        if not (value.isascii() and value.isprintable()):
            raise InvalidRequestError(f"the value of metadata key {key!r} must be printable ASCII")
    return checked


def _host_and_port(rest: str, port: int) -> str:
    host, _, path = rest.partition("/")
    if not host or path:
        raise InvalidRequestError(f"target {rest!r}: give host:port without a path")
    has_port = ":" in host.rpartition("]")[2]
    return host if has_port else f"{host}:{port}"


def _is_loopback(target: str) -> bool:
    host = target.rpartition("/")[2].rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def version() -> str:
    """The installed version of this package; "0" when it runs from a source tree."""
    try:
        return distributions.version("autoglm")
    except distributions.PackageNotFoundError:
        return "0"
