"""Gives every service account its certificate and renews it at half its life; `rotate` renews all at once.

Owns the identity folder of one mesh. A renewal that fails is tried again: the certificate in use is good for as long.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from services.mesh.identity import files
from services.mesh.identity.authority import Authority, Certificate
from services.mesh.registry import spiffe_id
from services.mesh.translate.views import INGRESS

log = logging.getLogger("autoglm.identity")

HALF_LIFE, JITTER = 0.5, 0.1
"""Renewal after this share of the life, give or take: so that not all members renew in one moment."""
RETRY = timedelta(seconds=10)
SHORTEST_S = 0.05
"""Between two looks, as certificates become short-lived when the authority's own end is near."""


@dataclass(frozen=True, slots=True)
class Terms:
    """How long certificates and the authority live."""

    certificate: timedelta = timedelta(hours=24)
    authority: timedelta = timedelta(days=365)


@dataclass(frozen=True, slots=True)
class Issued:
    """The certificate of an account that is in force."""

    account: str
    identity: str
    certificate: Certificate
    renew_at: datetime
    count: int


class Identities:
    """`prepare` before Envoy starts, then `run` until cancelled; `rotate` at any time, from the same loop."""

    def __init__(
        self,
        folder: Path,
        authority: Authority,
        namespace: str,
        accounts: Iterable[str],
        terms: Terms,
        changed: Callable[[], None],
        chance: Callable[[], float],
    ) -> None:
        """`chance` gives a number from 0 to 1 for the jitter of each renewal."""
        self._folder, self._authority, self._namespace = folder, authority, namespace
        self._terms, self._changed, self._chance = terms, changed, chance
        self._accounts = tuple(sorted(accounts))
        self._issued: dict[str, Issued] = {}
        self._rotated = asyncio.Event()

    @property
    def issued(self) -> tuple[Issued, ...]:
        """What is in force, by account."""
        return tuple(self._issued.values())

    def prepare(self) -> None:
        """Writes the root and a fresh certificate for everybody. Raises OSError."""
        files.write_root(self._folder, self._authority.root)
        self.rotate()

    def rotate(self) -> None:
        """New keys and certificates for all accounts now. Connections that are open keep what they have."""
        for account in self._accounts:
            self._renew(account, datetime.now(UTC))
        self._changed()
        self._rotated.set()

    async def run(self) -> None:
        """Renews until cancelled, or until the authority itself has ended."""
        while (now := datetime.now(UTC)) < self._authority.expires:
            self._rotated.clear()
            due = min((item.renew_at for item in self._issued.values()), default=now + self._terms.certificate)
            try:
                await asyncio.wait_for(self._rotated.wait(), max(SHORTEST_S, (due - now).total_seconds()))
                continue
            except TimeoutError:
                pass
            try:
                await asyncio.to_thread(self._renew_due, datetime.now(UTC))
            except OSError as error:
                log.error("a certificate was not renewed; trying again", extra={"facts": {"error": str(error)}})
                await asyncio.sleep(RETRY.total_seconds())
            self._changed()
        log.error("the authority has ended; delete its folder and start again")

    def _renew_due(self, now: datetime) -> None:
        for item in self.issued:
            if item.renew_at <= now:
                self._renew(item.account, now)

    def _renew(self, account: str, now: datetime) -> None:
        identity = spiffe_id(self._namespace, account)
        certificate = self._authority.issue(identity, self._terms.certificate, now)
        files.write_certificate(self._folder, account, certificate)
        count = self._issued[account].count + 1 if account in self._issued else 1
        self._issued[account] = Issued(account, identity, certificate, renewal(certificate, self._chance()), count)
        facts = {"account": account, "serial": certificate.serial, "expires": certificate.expires.isoformat()}
        log.info("certificate issued", extra={"facts": facts})


def write_trial(folder: Path, namespace: str, services: Iterable[str], terms: Terms) -> None:
    """A complete folder under an authority that is forgotten at once, to check a configuration with."""
    authority = Authority.create(terms.authority, datetime.now(UTC))
    accounts = {INGRESS, *services}
    Identities(folder, authority, namespace, accounts, terms, lambda: None, lambda: 0.5).prepare()


def renewal(certificate: Certificate, chance: float) -> datetime:
    """When to renew; `chance` is from 0 to 1."""
    share = HALF_LIFE + JITTER * (chance - 0.5)
    return certificate.issued + (certificate.expires - certificate.issued) * share
