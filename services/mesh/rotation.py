"""`python -m services.mesh rotate`: asks the supervisor for new certificates and waits until Envoy shows them."""

from __future__ import annotations

import asyncio
import os
import time

from services.mesh import state
from services.mesh.envoy import Admin
from services.mesh.local import ROTATE_SIGNAL
from services.mesh.rundir import RunDirectory
from services.mesh.state import IdentityState, MeshState

POLL_S = 0.02


class NotRotated(Exception):
    """The new certificates did not arrive; the text says how far they came."""


def rotate(directory: RunDirectory, before: MeshState, timeout_s: float) -> list[IdentityState]:
    """The new certificates, once every connection that is made now uses them. Raises `NotRotated`."""
    deadline = time.monotonic() + timeout_s
    try:
        os.kill(before.pid, ROTATE_SIGNAL)
    except ProcessLookupError:
        raise NotRotated("the mesh stopped meanwhile") from None
    old = {item.account: item.count for item in before.identities}
    while True:
        current = state.read(directory.state)
        found = current.identities if current is not None else []
        if found and all(item.count > old.get(item.account, 0) for item in found):
            break
        if time.monotonic() > deadline:
            raise NotRotated(f"no new certificates within {timeout_s:g} s; see the log of the mesh")
        time.sleep(POLL_S)
    host, _, port = before.addresses.admin.rpartition(":")
    admin = Admin(host, int(port))
    while missing := asyncio.run(_not_loaded(admin, found)):
        if time.monotonic() > deadline:
            raise NotRotated(f"Envoy still shows old certificates of {', '.join(missing)} after {timeout_s:g} s")
        time.sleep(POLL_S)
    return found


async def _not_loaded(admin: Admin, wanted: list[IdentityState]) -> list[str]:
    """The accounts of which Envoy shows another certificate than the wanted one."""
    try:
        loaded = await admin.certificates()
    except OSError:
        return [item.account for item in wanted]
    return [
        item.account
        for item in wanted
        if any(one.spiffe_id == item.spiffe_id and one.serial != item.serial for one in loaded)
    ]
