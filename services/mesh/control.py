"""The control loop: when the policy files or the endpoints change, Envoy gets a new configuration or keeps the old.

An edit goes through four sieves: our own loader and checks, the translator, `envoy --mode validate`, and finally the
running Envoy, whose acceptance is read back. What fails any of them is undone and reported with all reasons.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from services.mesh import envoy, inputs, policy
from services.mesh.envoy import Admin, Invalid
from services.mesh.policy import Policy, PolicyError
from services.mesh.policy.kustomize import KUSTOMIZATION, folders
from services.mesh.policy.reading import DEFAULT_LIMITS
from services.mesh.registry import Registry
from services.mesh.rundir import write_atomically
from services.mesh.state import PolicyState, RouteWeight
from services.mesh.translate import NodeSettings, Snapshot, Step, translate

log = logging.getLogger("autoglm.control")

ASK_PAUSE_S = 0.02
MAX_REASONS = 50
SETTLED_S = 0.02
"""File systems stamp changes with a clock that ticks every 1 to 10 ms: of two changes in one tick, the second is seen
only if nothing was read before the tick had passed. It also spares us files that are half written or just replaced."""

UNSETTLED_ROUNDS = 20
RECOVERY_S = 1.0

Fingerprint = tuple[tuple[str, int, int, int], ...]


class Refused(Exception):
    """An edit cannot be served. `reasons` has all of them."""

    def __init__(self, reasons: list[str]) -> None:
        super().__init__("\n".join(reasons))
        self.reasons = reasons[:MAX_REASONS]


@dataclass(frozen=True, slots=True)
class Pace:
    """How often the folder is looked at, and how long Envoy may take."""

    watch_s: float = 0.1
    accept_s: float = 2.0


class Control:
    """Owns the files Envoy reads. `prepare` once before Envoy starts, then `run` until cancelled."""

    def __init__(
        self,
        directory: Path,
        node: NodeSettings,
        admin: Admin,
        registry: Callable[[], Registry],
        pace: Pace,
        changed: Callable[[], None],
    ) -> None:
        self._directory, self._node, self._admin = directory, node, admin
        self._registry, self._pace, self._changed = registry, pace, changed
        self._policy = Policy()
        self._snapshot: Snapshot | None = None
        self._seen: Fingerprint = ()
        self._unsettled_rounds = 0
        self._endpoints_moved = asyncio.Event()
        self._settled = asyncio.Event()
        self.state = PolicyState()

    @property
    def bootstrap(self) -> Path:
        """The file Envoy is started with."""
        return self._node.run_directory / "bootstrap.json"

    async def prepare(self) -> None:
        """Writes the first configuration. Raises `Refused`: without a policy nothing is started."""
        self._seen = fingerprint(self._directory)
        self._node.run_directory.mkdir(parents=True, exist_ok=True)
        self._policy, snapshot, warnings = await self._sieve(self._registry())
        for name, content in snapshot.files().items():
            write_atomically(self._node.run_directory / name, content.decode())
        self._accept(snapshot, warnings, 0.0)

    def endpoints_changed(self) -> None:
        """Call when a process became ready or went away."""
        self._settled.clear()
        self._endpoints_moved.set()

    async def settled(self) -> None:
        """Returns when Envoy has been given the present endpoints."""
        await self._settled.wait()

    async def run(self) -> None:
        """Watches until cancelled. No mistake in a policy file and no silence of Envoy's ends it."""
        while True:
            try:
                await asyncio.wait_for(self._endpoints_moved.wait(), self._pace.watch_s)
            except TimeoutError:
                pass
            try:
                await self._round()
            except Refused as refused:
                self._refuse(refused.reasons)
            except OSError as error:
                log.warning("Envoy could not be reached; trying again", extra={"facts": {"error": str(error)}})
                await asyncio.sleep(self._pace.watch_s)
                self._seen = ()
                self._endpoints_moved.set()
            except Exception as error:  # a bug of ours; the loop has to live for the next edit
                log.exception("the control loop stumbled; trying again")
                self._refuse([f"internal error, see the log of the supervisor: {error!r}"[:500]])
                await asyncio.sleep(RECOVERY_S)
                self._endpoints_moved.set()  # not the files: endpoints must go on moving under the old policy

    async def _round(self) -> None:
        seen = await asyncio.to_thread(fingerprint, self._directory)
        if seen != self._seen and await self._is_at_rest(seen):
            self._seen = seen
            began = time.monotonic()
            new_policy, snapshot, warnings = await self._sieve(self._registry())
            await self._apply(snapshot)
            self._policy = new_policy
            self._accept(snapshot, warnings, (time.monotonic() - began) * 1e3)
        if self._endpoints_moved.is_set():
            self._endpoints_moved.clear()
            snapshot = translate(self._policy, self._registry(), self._node)
            await self._apply(snapshot)
            self._snapshot = snapshot
            self._remember_inputs()
            self._warn(warnings_of(self._policy, self._registry()))
            if not self._endpoints_moved.is_set():
                self._settled.set()

    async def _is_at_rest(self, seen: Fingerprint) -> bool:
        """Whether a change is complete. Files that never rest are not read, and that is said once."""
        await asyncio.sleep(SETTLED_S)
        again = await asyncio.to_thread(fingerprint, self._directory)
        if again == seen and has_settled(seen, time.time_ns()):
            self._unsettled_rounds = 0
            return True
        self._unsettled_rounds += 1
        if self._unsettled_rounds == UNSETTLED_ROUNDS:
            raise Refused([f"the files under {self._directory} do not stop changing; they are read when they rest"])
        return False

    async def _sieve(self, registry: Registry) -> tuple[Policy, Snapshot, list[str]]:
        try:
            loaded = await asyncio.to_thread(policy.load, self._directory)
            warnings = warnings_of(loaded, registry)
            snapshot = translate(loaded, registry, self._node)
            await envoy.validate(snapshot.static())
        except PolicyError as error:
            raise Refused([str(problem) for problem in error.problems]) from None
        except Invalid as error:
            raise Refused([f"Envoy refuses the translated policy: {error}"]) from None
        return loaded, snapshot, warnings

    async def _apply(self, snapshot: Snapshot) -> None:
        """Takes the steps one by one; after a refusal the files are put back as they were."""
        before = {} if self._snapshot is None else self._snapshot.files()
        touched: list[str] = []
        steps = snapshot.steps_from(self._snapshot)
        known = set(await self._admin.refusals()) if any(step.expects for step in steps) else set()
        try:
            for step in steps:
                touched += step.files
                for name, content in step.files.items():
                    write_atomically(self._node.run_directory / name, content.decode())
                await self._confirm(step, known)
        except Refused:
            for name in reversed(touched):
                if name in before:
                    write_atomically(self._node.run_directory / name, before[name].decode())
            raise
        if self._snapshot is not None:
            for name in snapshot.stale_files(self._snapshot):
                (self._node.run_directory / name).unlink(missing_ok=True)

    async def _confirm(self, step: Step, known: set[str]) -> None:
        """Waits for Envoy's yes. A refusal that was there before (`known`) is an older one and says nothing."""
        if not step.expects:
            return
        deadline = time.monotonic() + self._pace.accept_s
        missing = dict(step.expects)
        while time.monotonic() < deadline:
            texts = await self._admin.texts()
            missing = {name: version for name, version in step.expects.items() if texts.get(name) != version}
            if not missing:
                return
            if reasons := [reason for reason in await self._admin.refusals() if reason not in known]:
                raise Refused([f"Envoy refuses the new resources: {reason}" for reason in reasons])
            await asyncio.sleep(ASK_PAUSE_S)
        raise Refused([f"Envoy did not take the change within {self._pace.accept_s:g} s ({', '.join(missing)})"])

    def _accept(self, snapshot: Snapshot, warnings: list[str], took_ms: float) -> None:
        self._snapshot = snapshot
        self._remember_inputs()
        self.state = PolicyState(
            version=version_of(snapshot),
            accepted_unix_s=time.time(),
            accept_ms=round(took_ms, 1),
            weights=weights(self._policy),
        )
        log.info("policy accepted", extra={"facts": {"version": self.state.version, "ms": round(took_ms, 1)}})
        self._warn(warnings)
        self._changed()

    def _remember_inputs(self) -> None:
        """For whoever asks what an edit would change, or where a request would go."""
        inputs.write(inputs.Inputs(self._node, self._registry(), self._directory))

    def _warn(self, warnings: list[str]) -> None:
        """Warnings speak of what runs, so they come and go with the endpoints; each is logged when it comes."""
        for warning in warnings:
            if warning not in self.state.warnings:
                log.warning(warning)
        if warnings[:MAX_REASONS] != self.state.warnings:
            self.state = self.state.model_copy(update={"warnings": warnings[:MAX_REASONS]})
            self._changed()

    def _refuse(self, reasons: list[str]) -> None:
        self.state = self.state.model_copy(update={"refused": reasons, "refused_unix_s": time.time()})
        facts = {"version": self.state.version, "reasons": reasons}
        log.error("policy refused, the old one stays", extra={"facts": facts})
        self._changed()


def fingerprint(directory: Path) -> Fingerprint:
    """Changes whenever a policy file does. Cheap enough to ask ten times a second."""
    found = []
    for path in sorted({path for folder in _folders(directory) for path in folder.rglob("*.y*ml")}):
        try:
            status = path.stat()
        except OSError:  # an editor is replacing it
            continue
        found.append((str(path), status.st_mtime_ns, status.st_size, status.st_ino))
    return tuple(found)


def _folders(directory: Path) -> tuple[Path, ...]:
    """The folder, and those its kustomization leads to."""
    overlay = directory / KUSTOMIZATION
    try:
        status = overlay.stat()
    except OSError:
        return (directory,)
    return _folders_as_of(directory, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=8)
def _folders_as_of(directory: Path, *stamp: int) -> tuple[Path, ...]:
    return tuple(folders(directory, DEFAULT_LIMITS))


def has_settled(found: Fingerprint, now_ns: int) -> bool:
    """Whether the newest change is so old that another one would show. A time stamp from the future says nothing."""
    return not any(0 <= now_ns - changed_ns < SETTLED_S * 1e9 for _, changed_ns, _, _ in found)


def warnings_of(loaded: Policy, registry: Registry) -> list[str]:
    """What works and surely was not meant so."""
    return [str(problem) for problem in policy.check(loaded, registry) if problem.severity == "warning"]


def version_of(snapshot: Snapshot) -> str:
    """Digest of what the policy says; the comings and goings of endpoints leave it as it is."""
    content = [snapshot.clusters, snapshot.listeners, snapshot.routes]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def weights(loaded: Policy) -> list[RouteWeight]:
    """Every route that splits its traffic."""
    return [
        RouteWeight(
            host=", ".join(service.spec.hosts),
            route=str(route.name or ""),
            destination="/".join(filter(None, (target.destination.host, target.destination.subset))),
            weight=target.weight,
        )
        for service in loaded.virtual_services
        for route in service.spec.http
        if len(route.route) > 1
        for target in route.route
    ]
