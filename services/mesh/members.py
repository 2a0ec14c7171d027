"""Processes that somebody else starts, found by DNS name and asked for their health: who is ready right now.

A name may resolve to several addresses (replicas); each is a member. One is ready while its service says SERVING; it is
gone when it says otherwise, when its name no longer leads to it, or after two questions without an answer.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.mesh.topology import Topology

log = logging.getLogger("autoglm.members")

ASK_S = 1.0
SILENCES = 2
MAX_MEMBERS = 256
_NAMED = re.compile(r"([a-z][-a-z0-9]*)(?:/([a-z][-a-z0-9]*))?(?:=([A-Za-z0-9.-]{1,253}))?")


class Unknown(Exception):
    """A member that the topology does not have."""


@dataclass(frozen=True, slots=True)
class Group:
    """Equal processes behind one DNS name. `port` is the one that answers gRPC health."""

    service: str
    host: str
    port: int
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Member:
    """One process that is ready."""

    service: str
    address: str
    labels: Mapping[str, str] = field(hash=False)


def parse(text: str, known: Topology) -> tuple[Group, ...]:
    """`service[/replicas][=host]` entries as groups. Raises `Unknown` with what is there."""
    groups = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        named = _NAMED.fullmatch(entry)
        spec = known.services.get(named[1]) if named else None
        if named is None or spec is None:
            raise Unknown(f"AUTOGLM_MEMBERS: {entry!r} is not service[/replicas][=host] of {', '.join(known.services)}")
        replicas = {each.name: each.labels for each in spec.replicas}
        chosen = named[2] or next(iter(replicas))
        if chosen not in replicas:
            raise Unknown(f"AUTOGLM_MEMBERS: {entry!r}: {named[1]} has {', '.join(replicas)}")
        port = next(port.number for port in spec.ports if port.protocol == "grpc")
        groups.append(Group(named[1], named[3] or named[1], port, {"app": named[1], **replicas[chosen]}))
    return tuple(groups)


def health_name(service: str) -> str:
    """The gRPC service that a program's readiness is asked by: names are made the same way everywhere."""
    camel = "".join(word.capitalize() for word in service.split("-"))
    return f"autoglm.{service.replace('-', '_')}.v1.{camel}Service"


class Members:
    """Looks for the groups' processes. `look` once, then `watch`; `ready` is what the last look found."""

    def __init__(self, groups: tuple[Group, ...], pause_s: float) -> None:
        self._groups, self._pause_s = groups, pause_s
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._silent: dict[Member, int] = {}
        self.ready: list[Member] = []

    async def look(self) -> bool:
        """Asks everybody once. True when somebody came or went."""
        places = await asyncio.gather(*(_resolve(group.host) for group in self._groups))
        asked = [
            (Member(group.service, address, group.labels), f"{address}:{group.port}")
            for group, addresses in zip(self._groups, places, strict=True)
            for address in addresses
        ][:MAX_MEMBERS]
        await self._forget({place for _, place in asked})
        answers = await asyncio.gather(*(self._is_ready(member, place) for member, place in asked))
        found = [member for (member, _), is_ready in zip(asked, answers, strict=True) if is_ready]
        changed = found != self.ready
        for member in found:
            if member not in self.ready:
                log.info("came", extra={"facts": {"member": member.service, "address": member.address}})
        for member in self.ready:
            if member not in found:
                log.info("went", extra={"facts": {"member": member.service, "address": member.address}})
        self.ready = found
        return changed

    async def watch(self, changed: Callable[[], None]) -> None:
        """Looks again and again; `changed` is told."""
        while True:
            await asyncio.sleep(self._pause_s)
            if await self.look():
                changed()

    async def close(self) -> None:
        await self._forget(set())

    async def _is_ready(self, member: Member, place: str) -> bool:
        channel = self._channels.get(place)
        if channel is None:
            channel = self._channels[place] = grpc.aio.insecure_channel(place)
        request = health_pb2.HealthCheckRequest(service=health_name(member.service))
        try:
            answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=ASK_S)
        except grpc.RpcError:
            self._silent[member] = self._silent.get(member, 0) + 1
            return member in self.ready and self._silent[member] < SILENCES
        self._silent.pop(member, None)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    async def _forget(self, kept: set[str]) -> None:
        for place in self._channels.keys() - kept:
            await self._channels.pop(place).close(None)
        addresses = {place.rpartition(":")[0] for place in kept}
        self._silent = {member: count for member, count in self._silent.items() if member.address in addresses}


async def _resolve(host: str) -> list[str]:
    """The IPv4 addresses of a name, in a stable order; none while it does not resolve."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None, family=socket.AF_INET, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return sorted({str(entry[4][0]) for entry in found})
