"""The local mesh as one program: sink, Envoy and services under supervision, the control loop beside them.

`python -m services.mesh supervise` runs it, normally detached; the other commands read the state file it keeps.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import re
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

from pydantic import ValidationError

from services.mesh import envoy, metrics, model, ports, scrape, topology
from services.mesh.clouds.federation import Federation
from services.mesh.clouds.neighbours import Pace as FederationPace
from services.mesh.clouds.neighbours import Place, offer, placed
from services.mesh.control import Control, Pace, Refused
from services.mesh.envoy import Admin, EnvoyMissing
from services.mesh.identity import Authority, Identities, Issued, Terms, Unusable
from services.mesh.keys import keys_for
from services.mesh.process import Patience, Phase, Process, Program
from services.mesh.registry import Registry
from services.mesh.rundir import RunDirectory, write_atomically
from services.mesh.settings import FIXED_PORTS, MeshSettings, addresses
from services.mesh.state import Addresses, IdentityState, MeshState, ProcessState, Progress
from services.mesh.supervise import StartFailed, Supervisor
from services.mesh.topology import Instance, TopologyError
from services.mesh.translate import NodeSettings
from services.mesh.translate.views import INGRESS

log = logging.getLogger("autoglm.local")

SINK, ENVOY = "trace-sink", "envoy"
ROTATE_EVERY_S = 5.0
ROTATE_SIGNAL = signal.SIGHUP
"""Renews every certificate: what `python -m services.mesh rotate` sends."""


class CannotStart(Exception):
    """The mesh cannot be started as configured; the text says why and what to do."""


class LocalMesh:
    """One mesh in one run directory. Make it, `await run()`, gone."""

    def __init__(self, settings: MeshSettings) -> None:
        """Raises `CannotStart`."""
        if taken := ports.conflicts(settings):
            raise CannotStart("\n".join(taken))
        self.settings = settings = ports.settle(settings)
        self.directory = RunDirectory(settings.run_dir)
        self.own_address = settings.bind if settings.bind.startswith("127.") else "127.0.0.1"
        """What only this machine reaches; meshes on loopback addresses of their own do not meet there."""
        try:
            self.topology = topology.load(settings.topology, settings.replicas, settings.is_own_model)
            self._placeholders = model.placeholders(settings) | {"{run_dir}": str(self.directory.root)}
            self._supply = ports.free(settings.bind, ports.promised(settings))
            self.instances = {item.name: item for item in topology.instances(self.topology, self._supply)}
            self._callers = topology.callers(self.topology, self._supply)
            self.identities = self._identities()
            self._ports = {
                name: dict(item.ports) | {"metrics": next(self._supply)} for name, item in self.instances.items()
            }
            self._ports[SINK] = {"grpc": settings.otlp_port, "metrics": next(self._supply), "query": next(self._supply)}
            self._ports[ENVOY] = {
                name.removesuffix("_port"): int(getattr(settings, name)) for name, _ in FIXED_PORTS[:2]
            }
            self.keys = keys_for(settings.issuer_dir or self.directory.issuer)
            self._metrics_port = next(self._supply)
            self.admin = Admin(self.own_address, settings.admin_port)
            self.control = Control(
                settings.policy_dir,
                self._node(),
                self.admin,
                self.registry,
                Pace(settings.watch_ms / 1000, settings.accept_timeout_s),
                self._changed,
                self.keys,
            )
            self.supervisor = Supervisor(self._programs(), self._patience(), self._process_changed)
            self.federation = self._federation()
        except (TopologyError, EnvoyMissing, Unusable, OSError, ValueError) as error:
            raise CannotStart(str(error)) from None
        self._phase = "starting"
        self._reason = ""
        self._started = time.time()
        self._up_s = 0.0
        self._targets = ""
        self._endpoints: frozenset[str] = frozenset()
        self._dirty = asyncio.Event()
        self._stopping = asyncio.Event()

    async def run(self) -> int:
        """Until SIGTERM or SIGINT; the caller holds the run directory. Returns the exit status: 1 if never up."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        metrics.serve(self.state, self.settings.bind, self._metrics_port)
        loop.add_signal_handler(ROTATE_SIGNAL, self._rotate)
        self._write_state()
        writer = asyncio.create_task(self._keep_state())
        beside: list[asyncio.Task[None]] = []
        try:
            self.identities.prepare()
            await self.control.prepare()
            self.supervisor.start()
            beside = [
                asyncio.create_task(run)
                for run in (
                    self._control(),
                    self._rotate_access_log(),
                    self.identities.run(),
                    self.keys.keep(self.control.keys_changed),
                )
            ]
            if self.federation is not None:
                beside.append(asyncio.create_task(self.federation.run()))
            await self._until_up()
            await self._stopping.wait()
            self._enter("stopping")
        except (StartFailed, Refused, OSError) as error:
            self._reason = str(error)
            log.error("the mesh did not start", extra={"facts": {"reason": self._reason}})
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)
            await self.supervisor.stop()
            writer.cancel()
            self._enter("failed" if self._reason else "stopped", self._reason)
        return 1 if self._phase == "failed" else 0

    def registry(self) -> Registry:
        """The services with the instances that are ready now, here and in the other clouds."""
        return self._own() if self.federation is None else self.federation.joined(self._own())

    def _own(self) -> Registry:
        ready = [item for name, item in self.instances.items() if self._is_ready(name)]
        own = topology.registry(self.topology, self.settings.namespace, self.settings.bind, ready)
        return placed(own, self.place) if self.settings.cloud else own

    def _federation(self) -> Federation | None:
        settings = self.settings
        if not settings.cloud:
            return None
        pace = FederationPace(
            settings.federation_heartbeat_ms / 1e3, settings.federation_stale_ms / 1e3, settings.federation_ramp_s
        )
        kept = frozenset(name for name, spec in self.topology.services.items() if spec.cluster_local)
        return Federation(
            settings.bind,
            settings.federation_port,
            addresses(settings.peers, "AUTOGLM_PEERS"),
            pace,
            lambda: offer(self._own(), settings.cloud, kept),
            self.control.endpoints_changed,
        )

    @property
    def place(self) -> Place:
        """Where this mesh is among the clouds."""
        return Place(self.settings.cloud, self.settings.locality)

    async def _until_up(self) -> None:
        up = asyncio.create_task(self._all_up())
        stop = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait({up, stop}, return_when=asyncio.FIRST_COMPLETED)
            if up.done():
                await up
                self._up_s = time.time() - self._started
                self._enter("up")
                log.info("up", extra={"facts": {"seconds": round(self._up_s, 2)}})
        finally:
            for task in (up, stop):
                task.cancel()
            await asyncio.gather(up, stop, return_exceptions=True)

    async def _all_up(self) -> None:
        await self.supervisor.all_ready()
        self.control.endpoints_changed()
        await self.control.settled()

    async def _control(self) -> None:
        await self.supervisor.processes[ENVOY].was_ready.wait()
        await self.control.run()

    def _is_ready(self, name: str) -> bool:
        return name in self.supervisor.processes and self.supervisor.processes[name].phase is Phase.READY

    def _process_changed(self) -> None:
        ready = frozenset(name for name in self.instances if self._is_ready(name))
        if ready != self._endpoints:
            self._endpoints = ready
            self.control.endpoints_changed()
            if self.federation is not None:
                self.federation.offer_changed()
        self._changed()

    def _changed(self) -> None:
        self._dirty.set()

    def _enter(self, phase: str, reason: str = "") -> None:
        self._phase, self._reason = phase, reason
        self._write_state()

    async def _keep_state(self) -> None:
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            self._write_state()
            await asyncio.sleep(0.05)  # several changes at once make one write

    def _write_state(self) -> None:
        state = self.state()
        write_atomically(self.directory.state, state.model_dump_json(indent=1))
        if (found := scrape.targets_text(state, scrape.cloud_of(self.directory.root))) != self._targets:
            write_atomically(self.directory.root / scrape.TARGETS, found)
            self._targets = found

    def state(self) -> MeshState:
        """What the state file says."""
        here = self.settings.bind
        at = self._ports[ENVOY]
        return MeshState(
            phase=self._phase,
            pid=os.getpid(),
            started_unix_s=self._started,
            up_s=round(self._up_s, 3),
            reason=self._reason,
            addresses=Addresses(
                ingress=f"{here}:{at['ingress']}",
                outbound={item.service_account: f"{self.own_address}:{item.port}" for item in self._callers},
                admin=f"{self.own_address}:{at['admin']}",
                otlp=f"{here}:{self._ports[SINK]['grpc']}",
                traces=f"{here}:{self._ports[SINK]['query']}",
                metrics=f"{here}:{self._metrics_port}",
            ),
            model=model.name(self.settings),
            model_dir=self.settings.model_place,
            processes=[self._process_state(name, process) for name, process in self.supervisor.processes.items()],
            policy=self.control.state,
            identities=[_identity_state(item) for item in self.identities.issued],
        )

    def _process_state(self, name: str, process: Process) -> ProcessState:
        instance = self.instances.get(name)
        return ProcessState(
            name=name,
            service=instance.service if instance else name,
            phase=process.phase.value,
            pid=process.pid,
            restarts=process.restarts,
            since_unix_s=process.since,
            start_s=round(process.start_s, 3),
            last_exit=process.last_exit,
            ports={k: v for k, v in self._ports[name].items() if k != "metrics"},
            inbound=dict(instance.inbound) if instance else {},
            metrics_port=self._ports[name].get("metrics", 0),
            labels=dict(instance.labels) if instance else {},
            log=str(process.program.log),
            last_line=(process.last_lines(1) or [""])[0][:500],
            progress=_progress(process.progress),
        )

    def _node(self) -> NodeSettings:
        settings = self.settings
        return NodeSettings(
            run_directory=self.directory.envoy,
            listen_address=settings.bind,
            ingress_port=settings.ingress_port,
            callers=self._callers,
            sidecars=topology.sidecars(self.topology, settings.namespace, self.instances.values()),
            identities=self.directory.identity,
            namespace=settings.namespace,
            upstream_address=self.own_address,
            admin_port=settings.admin_port,
            otlp_endpoint=f"{settings.bind}:{settings.otlp_port}",
            locality=settings.locality,
            labels=self.place.labels,
            network=settings.cloud,
            network_gateways={
                name: (at,) for name, at in addresses(settings.eastwest_gateways, "AUTOGLM_EASTWEST_GATEWAYS").items()
            },
            eastwest_port=settings.eastwest_port,
            eastwest_services=frozenset(
                name for name, spec in self.topology.services.items() if not spec.cluster_local
            ),
            ping_interval_s=settings.ping_interval_ms / 1e3 if settings.cloud else 0.0,
            ping_timeout_s=settings.ping_timeout_ms / 1e3,
            # A laptop shows a change at once; production keeps Istio's second.
            update_merge_window_s=0.0,
        )

    def _identities(self) -> Identities:
        settings, home = self.settings, self.directory.identity
        terms = Terms(timedelta(hours=settings.certificate_hours), timedelta(days=settings.authority_days))
        authority = Authority.open(settings.ca_dir or home / "authority", terms.authority, datetime.now(UTC))
        accounts = {INGRESS, *(item.service for item in self.instances.values())}
        return Identities(home, authority, settings.namespace, accounts, terms, self._changed, random.random)

    def _rotate(self) -> None:
        try:
            self.identities.rotate()
        except OSError as error:
            log.error("not every certificate was renewed", extra={"facts": {"error": str(error)}})

    def _patience(self) -> Patience:
        s = self.settings
        return Patience(
            s.start_timeout_s,
            s.start_attempts,
            s.backoff_first_s,
            s.backoff_cap_s,
            s.stable_s,
            s.drain_grace_s,
            s.log_bytes,
        )

    def _programs(self) -> list[Program]:
        python = sys.executable
        sink = Program(
            SINK,
            (python, "-m", "services.mesh.sink"),
            self._environment(SINK, {"AUTOGLM_OTLP_FORWARD": self.settings.otlp_forward}),
            self.directory.log(SINK),
        )
        proxy = Program(
            ENVOY,
            envoy.command(self.control.bootstrap, self.settings.drain_grace_s),
            _plain_environment(),
            self.directory.log(ENVOY),
            probe=self.admin.is_live,
        )
        services = [
            Program(
                item.name,
                (python, "-m", item.module),
                self._service_environment(item),
                self.directory.log(item.name),
                after=(ENVOY, *item.after),
            )
            for item in self.instances.values()
        ]
        return [sink, proxy, *services]

    def _environment(self, name: str, extra: Mapping[str, str]) -> dict[str, str]:
        given = {f"AUTOGLM_{port.upper()}_PORT": str(number) for port, number in self._ports[name].items()}
        fixed = {
            "AUTOGLM_INSTANCE": name,
            # Only their sidecars are reached from elsewhere.
            "AUTOGLM_BIND": self.own_address if name in self.instances else self.settings.bind,
            "AUTOGLM_NAMESPACE": self.settings.namespace,
            "AUTOGLM_DRAIN_GRACE_S": str(self.settings.drain_grace_s),
            "PYTHONUNBUFFERED": "1",
        }
        return {**os.environ, **extra, **fixed, **given}

    def _service_environment(self, item: Instance) -> dict[str, str]:
        known = {**item.labels, **(self.place.labels if self.settings.cloud else {})}
        labels = ",".join(f"{key}={value}" for key, value in known.items() if key != "app")
        extra = {"AUTOGLM_OTLP_ENDPOINT": f"{self.settings.bind}:{self.settings.otlp_port}", **self._placed(item)}
        # As Envoy knows it: a worker tells the picker, whose choice must be one of Envoy's endpoints.
        extra["AUTOGLM_ADVERTISE"] = f"{self.settings.bind}:{next(iter(item.inbound.values()))}"
        for caller in self._callers:
            if caller.service_account == item.service:
                extra["AUTOGLM_MESH_ADDRESS"] = f"{self.own_address}:{caller.port}"
        if labels:
            extra["AUTOGLM_LABELS"] = labels
        if locality := item.locality or self.settings.locality:
            extra["AUTOGLM_LOCALITY"] = locality
        return self._environment(item.name, extra)

    def _placed(self, item: Instance) -> dict[str, str]:
        return {key: self._filled_in(value) for key, value in item.environment.items()}

    def _filled_in(self, value: str) -> str:
        """In one pass: what is filled in may itself contain braces."""
        names = "|".join(re.escape(name) for name in self._placeholders)
        return re.sub(names, lambda found: self._placeholders[found[0]], value)

    async def _rotate_access_log(self) -> None:
        path = self.directory.envoy / "access.log"
        while True:
            await asyncio.sleep(ROTATE_EVERY_S)
            with suppress(OSError):
                if path.exists() and path.stat().st_size > self.settings.log_bytes:
                    path.replace(path.with_name("access.log.1"))
                if not path.exists():  # also when Envoy did not hear us the last time
                    await self.admin.reopen_logs()


def _identity_state(item: Issued) -> IdentityState:
    certificate = item.certificate
    return IdentityState(
        account=item.account,
        spiffe_id=item.identity,
        serial=certificate.serial,
        issued_unix_s=certificate.issued.timestamp(),
        expires_unix_s=certificate.expires.timestamp(),
        renew_unix_s=item.renew_at.timestamp(),
        count=item.count,
    )


def _progress(facts: Mapping[str, Any]) -> Progress | None:
    try:
        return Progress.model_validate(facts) if facts else None
    except ValidationError:
        return None


def _plain_environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("AUTOGLM_")}
