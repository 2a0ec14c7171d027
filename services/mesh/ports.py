"""Ports on the loopback: free ones for the services, and a clear word when a fixed one is taken."""

from __future__ import annotations

import random
import socket
from collections.abc import Container, Iterator

from services.mesh.settings import FIXED_PORTS, MeshSettings

LOW, HIGH = 20_000, 32_000
"""Below the kernel's range for outgoing connections (32768 and up on Linux), so none of those takes a port first."""


def is_free(address: str, port: int) -> bool:
    """Whether something could listen there now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True


def free(address: str, besides: Container[int] = ()) -> Iterator[int]:
    """Free ports, each once, none of `besides`: those already promised, where nobody may be listening yet.

    Raises OSError when none can be found.
    """
    for port in random.sample(range(LOW, HIGH), HIGH - LOW):
        if port not in besides and is_free(address, port):
            yield port
    raise OSError(f"no free port on {address} between {LOW} and {HIGH}")


def settle(settings: MeshSettings) -> MeshSettings:
    """The settings with every 0 among the fixed ports replaced by a free one."""
    supply = free(settings.bind, promised(settings))
    chosen = {name: next(supply) for name, _ in FIXED_PORTS if getattr(settings, name) == 0}
    return settings.model_copy(update=chosen)


def promised(settings: MeshSettings) -> frozenset[int]:
    """The ports the settings name, whether somebody listens there yet or not."""
    names = (*(name for name, _ in FIXED_PORTS), "federation_port", "eastwest_port")
    return frozenset(int(getattr(settings, name)) for name in names)


def conflicts(settings: MeshSettings) -> list[str]:
    """One line per fixed port that is taken, or asked for twice, naming the setting that moves it."""
    lines: list[str] = []
    seen: dict[int, str] = {}
    for name, purpose in FIXED_PORTS:
        port, variable = int(getattr(settings, name)), f"AUTOGLM_{name.upper()}"
        if port == 0:
            continue
        if port in seen:
            lines.append(f"{variable} and {seen[port]} both say {port}; give one of them another port")
        elif not is_free(settings.bind, port):
            suggestion = next(free(settings.bind))
            lines.append(
                f"port {port} ({purpose}) is taken by another program; free it, or choose: {variable}={suggestion}"
            )
        seen[port] = variable
    return lines
