"""Several clouds as one program: networks, the ways between them, and one mesh per cloud, each kept running.

`python -m services.mesh.clouds supervise` runs it, normally detached. A cloud that dies is started again; the others do
not notice more of it than they would of a real one.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping

from services.mesh import ports
from services.mesh.clouds import network, plan, shared_artifacts, shared_cache, state, wan, watches
from services.mesh.clouds.network import Network, NoNetwork
from services.mesh.clouds.plan import PORTS, Cloud, Plan, PlanError
from services.mesh.clouds.settings import CloudsSettings
from services.mesh.clouds.shared_cache import SharedCache
from services.mesh.clouds.state import CloudsState, CloudState
from services.mesh.identity import Unusable
from services.mesh.issuer import Issuer
from services.mesh.local import CannotStart
from services.mesh.process import Patience, Process, Program
from services.mesh.rundir import RunDirectory, write_atomically
from services.mesh.supervise import StartFailed, Supervisor

log = logging.getLogger("autoglm.clouds")

LOOPBACK_MIDDLE = "127.0.0.1"


class Clouds:
    """All clouds of one run directory. Make it, `await run()`, gone."""

    def __init__(self, settings: CloudsSettings) -> None:
        """Raises `CannotStart`."""
        self.settings = settings
        self.directory = RunDirectory(settings.clouds_dir)
        self.issuer = (settings.issuer_dir or self.directory.issuer).absolute()
        try:
            Issuer.open(self.issuer)  # before three meshes look for it at once
            spec = plan.load(settings.clouds_plan)
            self.remark = watches.make_room(len(spec.clouds))
            self._net, self._why_not = _choose(settings)
            names = tuple(spec.clouds)
            if self._net is not None:
                network.build(self._net, names)
            self._middle = self._net.middle if self._net is not None else LOOPBACK_MIDDLE
            self._supply = ports.free(self._middle)
            self.plan = self._place(spec)
            self._shared = self._find_shared_cache()
        except (PlanError, NoNetwork, watches.NoRoom, Unusable, OSError) as error:
            raise CannotStart(str(error)) from None
        patience = Patience(
            start_timeout_s=settings.clouds_start_timeout_s,
            backoff_first_s=settings.clouds_restart_s,
            backoff_cap_s=max(10.0, settings.clouds_restart_s),
            grace_s=4 * (settings.drain_grace_s + 2.0),
        )
        shared = [self._shared.program(self.directory.log(shared_cache.NAME))] if self._shared is not None else []
        self.supervisor = Supervisor([*shared, *map(self._program, self.plan.clouds)], patience, self._changed)
        self._phase, self._reason = "starting", ""
        self._dirty = asyncio.Event()
        self._stopping = asyncio.Event()

    async def run(self) -> int:
        """Until SIGTERM or SIGINT. Returns the exit status: 1 if never up."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        self._write()
        writer = asyncio.create_task(self._keep_state())
        way = wan.Wan(self.plan.ways.values(), self.plan.distance)
        try:
            await way.open()
            self.supervisor.start()
            await self._until_up()
            await self._stopping.wait()
        except (StartFailed, OSError) as error:
            self._reason = str(error)
            log.error("the clouds did not start", extra={"facts": {"reason": self._reason}})
        finally:
            self._enter("stopping")
            await self.supervisor.stop()
            await way.close()
            writer.cancel()
            if self._net is not None:
                network.remove(self._net)
            self._enter("failed" if self._reason else "stopped")
        return 1 if self._reason else 0

    async def _until_up(self) -> None:
        up = asyncio.create_task(self.supervisor.all_ready())
        stop = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait({up, stop}, return_when=asyncio.FIRST_COMPLETED)
            if up.done():
                await up
                self._enter("up")
        finally:
            for task in (up, stop):
                task.cancel()
            await asyncio.gather(up, stop, return_exceptions=True)

    def _place(self, spec: plan.PlanSpec) -> Plan:
        names = tuple(spec.clouds)
        net = self._net
        if net is not None:
            where = {name: net.address(number) for number, name in enumerate(names)}
        else:
            where = {name: f"127.0.{11 + number}.1" for number, name in enumerate(names)}
        is_own = net is not None and not self.settings.clouds_free_ports
        sources: dict[str, Iterator[int]] = {
            name: iter(PORTS.values()) if is_own else self._usual_or_free(where[name]) for name in names
        }
        root = self.settings.clouds_policy
        return plan.plan(spec, self.directory.root, root, where, self._middle, sources, self._supply)

    def _usual_or_free(self, address: str) -> Iterator[int]:
        """Ports on the loopback, where other programs may be."""
        supply = ports.free(address) if self._net is None else itertools.count(ports.LOW)
        for usual in PORTS.values():
            is_wanted = not self.settings.clouds_free_ports and self._net is None
            yield usual if is_wanted and ports.is_free(address, usual) else next(supply)

    def _program(self, cloud: Cloud) -> Program:
        inside = self._net.inside(cloud.name) if self._net is not None else ()
        directory = RunDirectory(cloud.run_dir)
        directory.logs.mkdir(parents=True, exist_ok=True)
        directory.state.unlink(missing_ok=True)  # what an earlier run left behind
        return Program(
            cloud.name,
            (*inside, sys.executable, "-m", "services.mesh", "supervise"),
            {
                **_inherited(),
                **self.plan.environment(cloud),
                "AUTOGLM_ISSUER_DIR": str(self.issuer),
                **(self._shared.environment() if self._shared is not None else {}),
                **self._artifacts(),
                "AUTOGLM_REPLICAS": self._replicas(cloud.name),
            },
            self.directory.log(cloud.name),
            after=(shared_cache.NAME,) if self._shared is not None else (),
            probe=lambda: self._is_up(cloud),
        )

    def _artifacts(self) -> dict[str, str]:
        return (
            shared_artifacts.environment(self.directory.root, os.environ)
            if self.settings.clouds_shared_artifacts
            else {}
        )

    def _find_shared_cache(self) -> SharedCache | None:
        if not self.settings.clouds_shared_cache:
            return None
        found = shared_cache.find(self._middle, next(self._supply))
        if found is None:
            names = " or ".join(shared_cache.SERVERS)
            raise CannotStart(f"AUTOGLM_CLOUDS_SHARED_CACHE needs {names} (Debian: make packages)")
        return found

    def _replicas(self, cloud: str) -> str:
        """The counts for all clouds and for this one: `sparse-inference/v1=1,azure:sparse-inference/canary=1`."""
        found = []
        for item in filter(None, (part.strip() for part in self.settings.clouds_replicas.split(","))):
            name, is_for_one, rest = item.partition(":")
            if not is_for_one or name == cloud:
                found.append(rest if is_for_one else item)
        return ",".join(found)

    async def _is_up(self, cloud: Cloud) -> bool:
        known = next(item for item in self.state().clouds if item.name == cloud.name)
        current = await asyncio.to_thread(lambda: known.mesh)
        return current is not None and current.phase == "up"

    def state(self) -> CloudsState:
        """What the state file says."""
        return CloudsState(
            pid=os.getpid(),
            network="namespaces" if self._net is not None else f"loopback: {self._why_not}",
            key=self._net.key if self._net is not None else "",
            phase=self._phase,
            reason=self._reason,
            remark=self.remark,
            issuer=self.issuer,
            one_way_ms=self.plan.distance.one_way_s * 1e3,
            clouds=[self._cloud_state(cloud, self.supervisor.processes[cloud.name]) for cloud in self.plan.clouds],
        )

    def _cloud_state(self, cloud: Cloud, process: Process) -> CloudState:
        return CloudState(
            name=cloud.name,
            locality=cloud.locality,
            address=cloud.address,
            run_dir=cloud.run_dir,
            policy=cloud.policy,
            ports=dict(cloud.ports),
            phase=process.phase.value,
            pid=process.pid,
            restarts=process.restarts,
        )

    def _changed(self) -> None:
        self._dirty.set()

    def _enter(self, phase: str) -> None:
        self._phase = phase
        self._write()

    async def _keep_state(self) -> None:
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            self._write()
            await asyncio.sleep(0.05)

    def _write(self) -> None:
        write_atomically(self.directory.root / state.FILE, self.state().model_dump_json(indent=1))


def _choose(settings: CloudsSettings) -> tuple[Network | None, str]:
    """Namespaces where they can be had; else why not."""
    if settings.clouds_network == "loopback":
        return None, "asked for by AUTOGLM_CLOUDS_NETWORK"
    if network.is_possible():
        return network.network(settings.clouds_dir), ""
    if settings.clouds_network == "namespaces":
        raise NoNetwork("AUTOGLM_CLOUDS_NETWORK=namespaces needs root, ip and nsenter")
    return None, "network namespaces need root, ip and nsenter"


def _inherited() -> Mapping[str, str]:
    """Ours without the settings of one mesh, which would be the same for all clouds."""
    single = {"AUTOGLM_RUN_DIR", "AUTOGLM_POLICY_DIR", "AUTOGLM_BIND", "AUTOGLM_REPLICAS", "AUTOGLM_INSTANCE"}
    return {key: value for key, value in os.environ.items() if key not in single}
