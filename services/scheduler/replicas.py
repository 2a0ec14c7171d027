"""The workers that hold a lease: who they are, how busy they say they are, which prefixes they hold.

A replica is in the table exactly as long as its lease stream lives. `server.py` feeds the table from streams, the
picker reads it. Single-threaded: everything runs on the event loop. The clock is passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from services.scheduler.placement import Candidate


@dataclass(frozen=True, slots=True)
class Registration:
    """What a worker says of itself once."""

    replica_id: str
    endpoint: str
    model: str
    variant_digest: str
    block_tokens: int
    max_running: int
    max_waiting: int = 0
    kv_capacity_bytes: int = 0
    labels: tuple[tuple[str, str], ...] = ()
    weight_bytes: int = 0
    kv_bytes_per_token: int = 0
    context_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Load:
    """How busy a worker says it is."""

    running: int = 0
    waiting: int = 0
    kv_used_bytes: int = 0
    pending_prefill_tokens: int = 0


@dataclass(slots=True, eq=False)
class Replica:
    """One lease. Mutable, owned by the table."""

    registration: Registration
    epoch: int
    on_superseded: Callable[[], None]
    """Called once when a newer lease of the same replica_id takes over."""
    load: Load = Load()
    reported_ns: int = 0
    draining: bool = False
    in_flight: int = 0
    in_flight_at_report: int = 0
    prefixes: dict[bytes, None] = field(default_factory=dict)
    """Block hashes in the order they were reported; a dict because a set forgets the order."""

    def matched_blocks(self, hashes: Sequence[bytes], known: int = 0) -> int:
        """How many of the leading blocks it is believed to hold, when it holds the first `known` for sure."""
        held = self.prefixes
        for index in range(known, len(hashes)):
            if hashes[index] not in held:
                return index
        return len(hashes)

    def candidate(self, matched_blocks: int) -> Candidate:
        """The replica as it stands now."""
        who, load = self.registration, self.load
        return Candidate(
            replica_id=who.replica_id,
            endpoint=who.endpoint,
            model=who.model,
            variant_digest=who.variant_digest,
            labels=who.labels,
            draining=self.draining,
            max_running=who.max_running,
            max_waiting=who.max_waiting,
            running=load.running,
            waiting=load.waiting,
            in_flight=self.in_flight,
            in_flight_at_report=self.in_flight_at_report,
            pending_prefill_tokens=load.pending_prefill_tokens,
            kv_used_bytes=load.kv_used_bytes,
            kv_capacity_bytes=who.kv_capacity_bytes,
            kv_bytes_per_token=who.kv_bytes_per_token,
            context_tokens=who.context_tokens,
            block_tokens=who.block_tokens,
            matched_blocks=matched_blocks,
            reported_ns=self.reported_ns,
        )


class TableFull(Exception):
    """The table holds its most replicas; a further one is refused."""


class ReplicaTable:
    """All leases by replica_id. `first_epoch` should exceed every epoch of earlier runs (the wall clock will do)."""

    def __init__(
        self, max_replicas: int, max_prefix_blocks: int, clock_ns: Callable[[], int], first_epoch: int = 1
    ) -> None:
        self._max_replicas, self._max_prefix_blocks = max_replicas, max_prefix_blocks
        self._clock_ns = clock_ns
        self._next_epoch = first_epoch
        self._replicas: dict[str, Replica] = {}
        self._sorted: tuple[Replica, ...] = ()

    def __len__(self) -> int:
        return len(self._replicas)

    def replicas(self) -> tuple[Replica, ...]:
        """All of them, sorted by replica_id."""
        return self._sorted

    def register(self, registration: Registration, on_superseded: Callable[[], None]) -> Replica:
        """A new lease. One of the same replica_id ends at once: its `on_superseded` is called. Raises TableFull."""
        name = registration.replica_id
        older = self._replicas.get(name)
        if older is None and len(self._replicas) >= self._max_replicas:
            raise TableFull(f"{self._max_replicas} replicas hold a lease already")
        replica = Replica(registration, self._next_epoch, on_superseded)
        self._next_epoch += 1
        self._replicas[name] = replica
        self._resort()
        if older is not None:
            older.on_superseded()
        return replica

    def remove(self, replica: Replica) -> bool:
        """Ends this very lease. False when a newer one took its place or it is gone already."""
        name = replica.registration.replica_id
        if self._replicas.get(name) is not replica:
            return False
        del self._replicas[name]
        self._resort()
        return True

    def report_load(self, replica: Replica, load: Load) -> None:
        """Replaces the load and notes when it came."""
        replica.load = load
        replica.reported_ns = self._clock_ns()
        replica.in_flight_at_report = replica.in_flight

    def report_prefixes(self, replica: Replica, reset: bool, added: Iterable[bytes], removed: Iterable[bytes]) -> int:
        """Applies a change; returns how many of the oldest blocks were forgotten because the set was full."""
        held = replica.prefixes
        if reset:
            held.clear()
        for name in removed:
            held.pop(name, None)
        for name in added:
            held[name] = None
        forgotten = max(0, len(held) - self._max_prefix_blocks)
        for name in list(held)[:forgotten] if forgotten else ():
            del held[name]
        return forgotten

    def get(self, replica_id: str) -> Replica | None:
        """The replica of that name, if it holds a lease."""
        return self._replicas.get(replica_id)

    def by_endpoint(self, endpoint: str) -> Replica | None:
        """The replica Envoy reaches at `endpoint`."""
        return next((replica for replica in self._sorted if replica.registration.endpoint == endpoint), None)

    def _resort(self) -> None:
        self._sorted = tuple(self._replicas[name] for name in sorted(self._replicas))


class Flight:
    """One request on its way, counted at the replica it was sent to until `end`. Use as a context manager."""

    __slots__ = ("_replica",)

    def __init__(self) -> None:
        self._replica: Replica | None = None

    def board(self, replica: Replica | None) -> None:
        """Counts the request at `replica`, and no longer where it was counted before."""
        if replica is self._replica:
            return
        self.end()
        self._replica = replica
        if replica is not None:
            replica.in_flight += 1

    def end(self) -> None:
        """Counts the request nowhere. May be called twice."""
        if self._replica is not None:
            self._replica.in_flight -= 1
            self._replica = None

    def __enter__(self) -> Flight:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
