"""Network namespaces for the clouds of one run: made, cut, mended, removed. Needs root; nothing else here does.

Every name comes from the run directory, so several runs stand side by side, and a start removes what a killed one left.
One bridge carries all; each cloud has one cable (a veth pair) to it, which a drill may pull.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

NETNS = Path("/run/netns")
COMMAND_S = 10.0


class NoNetwork(Exception):
    """Namespaces cannot be made here; the text has the command and its reason."""


@dataclass(frozen=True, slots=True)
class Network:
    """The names and addresses of one run."""

    key: str
    subnet: int

    @property
    def bridge(self) -> str:
        """The bridge, in the namespace of this machine."""
        return f"agm{self.key}"

    @property
    def middle(self) -> str:
        """This machine's own address on the bridge."""
        return f"10.213.{self.subnet}.1"

    def namespace(self, cloud: str) -> str:
        """The cloud's namespace."""
        return f"autoglm-{self.key}-{cloud}"

    def cable(self, cloud: str) -> str:
        """The near end of the cloud's cable (interface names have at most 15 characters)."""
        return f"ag{self.key}{hashlib.sha256(cloud.encode()).hexdigest()[:4]}"

    def address(self, number: int) -> str:
        """The address of the cloud of that number, from 0."""
        return f"10.213.{self.subnet}.{11 + number}"

    def inside(self, cloud: str) -> tuple[str, ...]:
        """In front of a command: run it in the cloud. It replaces itself, so the pid stays."""
        return ("nsenter", f"--net={NETNS / self.namespace(cloud)}")


def network(run_dir: Path) -> Network:
    """The network of the run directory. Equal directories give equal names."""
    digest = hashlib.sha256(str(run_dir.absolute()).encode()).digest()
    return Network(digest.hex()[:6], digest[8])


def is_possible() -> bool:
    """Whether this process may make namespaces."""
    return (
        os.geteuid() == 0 and Path("/proc/self/ns/net").exists() and _try("ip", "-V") and _try("nsenter", "--version")
    )


def build(net: Network, clouds: Iterable[str]) -> None:
    """Makes everything anew. Raises `NoNetwork`."""
    names = list(clouds)
    remove(net)
    _run("ip", "link", "add", net.bridge, "type", "bridge")
    _run("ip", "addr", "add", f"{net.middle}/24", "dev", net.bridge)
    _run("ip", "link", "set", net.bridge, "up")
    for number, cloud in enumerate(names):
        space, cable = net.namespace(cloud), net.cable(cloud)
        _run("ip", "netns", "add", space)
        _run("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
        _run("ip", "link", "set", cable, "master", net.bridge, "up")
        _run("ip", "-n", space, "link", "set", "lo", "up")
        _run("ip", "-n", space, "addr", "add", f"{net.address(number)}/24", "dev", "eth0")
        _run("ip", "-n", space, "link", "set", "eth0", "up")


def remove(net: Network) -> None:
    """Removes what there is of it, in whatever state. Processes in the namespaces are not ours to end."""
    spaces = sorted(path.name for path in NETNS.glob(f"autoglm-{net.key}-*")) if NETNS.is_dir() else []
    for space in spaces:
        _try("ip", "netns", "del", space)
    listed = subprocess.run(("ip", "-br", "link"), capture_output=True, text=True, timeout=COMMAND_S, check=False)
    for line in listed.stdout.splitlines():
        name = line.split()[0].split("@")[0] if line.split() else ""
        if name == net.bridge or (name.startswith(f"ag{net.key}") and len(name) == 12):
            _try("ip", "link", "del", name)


def pull(net: Network, cloud: str) -> None:
    """Pulls the cloud's cable: from now on its packets vanish, and nobody is told."""
    _run("ip", "link", "set", net.cable(cloud), "down")


def plug(net: Network, cloud: str) -> None:
    """Puts the cable back."""
    _run("ip", "link", "set", net.cable(cloud), "up")


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoNetwork(f"{' '.join(command)}: {error}") from None
    if done.returncode != 0:
        raise NoNetwork(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")


def _try(*command: str) -> bool:
    try:
        _run(*command)
    except NoNetwork:
        return False
    return True
