"""`python -m services.mesh.beside`: Envoy and its control plane for processes that somebody else runs: containers.

`make run` supervises processes; here they are only found, by name and health, and the same control loop gives Envoy the
same policy. Compose starts it (deploy/compose.yaml). Envoy is one hop between all of them, not a sidecar of each:
routes, weights, retries, ejection and the picker apply, identities do not.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

from pydantic import Field

from services.chassis.settings import Port, ServiceSettings, read
from services.chassis.telemetry import start_logging
from services.mesh import envoy, topology
from services.mesh.control import Control, Pace, Refused
from services.mesh.envoy import Admin, EnvoyMissing
from services.mesh.members import Member, Members, Unknown, parse
from services.mesh.process import LAUNCH
from services.mesh.registry import Endpoint, Registry, Service, ServicePort
from services.mesh.settings import MeshSettings
from services.mesh.topology import Topology, TopologyError
from services.mesh.translate import NodeSettings

log = logging.getLogger("autoglm.beside")

PROBE_PAUSE_S = 0.03
LOOPBACK = "127.0.0.1"


class BesideSettings(ServiceSettings):
    """Where Envoy listens and whom it finds. `bind` is Envoy's own address."""

    run_dir: Path = Field(Path(".run"), description="Envoy's generated configuration and its access log")
    policy_dir: Path = MeshSettings.model_fields["policy_dir"].default
    topology: Path = MeshSettings.model_fields["topology"].default
    members: str = Field(
        "gateway,tokenizer,scheduler,cache,sparse-inference/v1",
        max_length=4096,
        description="service[/replicas][=host], with commas: who there is, and the name its processes resolve by",
    )
    look_ms: int = Field(500, ge=50, le=60_000, description="how often members are resolved and asked for their health")
    ingress_port: Port = Field(8080, description="Envoy's port for clients")
    outbound_port: Port = Field(15001, description="Envoy's port for the services' own calls")
    admin_port: Port = Field(15000, description="Envoy's admin page, on loopback only")


def registry(known: Topology, namespace: str, ready: list[Member]) -> Registry:
    """What Kubernetes would tell Istio: the services of the topology, with the members that are ready behind them."""
    services = []
    for name, spec in known.services.items():
        endpoints = {
            port.name: tuple(
                Endpoint(member.address, port.number, member.labels) for member in ready if member.service == name
            )
            for port in spec.ports
        }
        ports = tuple(ServicePort(port.name, port.number, port.protocol) for port in spec.ports)
        services.append(Service(name, namespace, ports, endpoints, {"app": name}))
    return Registry(tuple(services))


async def run(settings: BesideSettings) -> int:
    """Until SIGTERM, or until Envoy ends: then 1, and whoever runs this starts it again."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    known = topology.load(settings.topology)
    members = Members(parse(settings.members, known), settings.look_ms / 1000)
    node = NodeSettings(
        run_directory=settings.run_dir.absolute() / "envoy",
        listen_address=settings.bind,
        upstream_address=settings.bind,
        ingress_port=settings.ingress_port,
        outbound_port=settings.outbound_port,
        admin_address=LOOPBACK,  # `bind` is for other containers
        admin_port=settings.admin_port,
        otlp_endpoint=settings.otlp_endpoint,
        update_merge_window_s=0.0,
    )
    admin = Admin(LOOPBACK, settings.admin_port)
    control = Control(
        settings.policy_dir,
        node,
        admin,
        lambda: registry(known, settings.namespace, members.ready),
        Pace(),
        lambda: None,
    )
    await members.look()
    await control.prepare()
    proxy = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", str(LAUNCH), str(os.getpid())),
        *envoy.command(control.bootstrap, settings.drain_grace_s),
        stdin=asyncio.subprocess.DEVNULL,
    )
    ended = asyncio.create_task(proxy.wait())
    stop = asyncio.create_task(stopping.wait())
    beside = [
        asyncio.create_task(_govern(control, admin)),
        asyncio.create_task(members.watch(control.endpoints_changed)),
    ]
    try:
        await asyncio.wait({ended, stop, *beside}, return_when=asyncio.FIRST_COMPLETED)
        return 0 if stopping.is_set() else 1
    finally:
        for task in (stop, *beside):
            task.cancel()
        with suppress(ProcessLookupError):
            proxy.terminate()
        await ended
        await asyncio.gather(*beside, return_exceptions=True)
        await members.close()


async def _govern(control: Control, admin: Admin) -> None:
    while not await admin.is_live():  # noqa: ASYNC110  # another program's state; nothing here could signal it
        await asyncio.sleep(PROBE_PAUSE_S)
    log.info("ready")
    await control.run()


def main() -> int:
    settings = read(BesideSettings)
    start_logging("mesh", settings)
    try:
        return asyncio.run(run(settings))
    except (TopologyError, Unknown, Refused, EnvoyMissing, OSError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
