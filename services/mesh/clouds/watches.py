"""Room for Envoy's file watches: every configuration file that an Envoy follows takes one inotify instance.

Three clouds follow more than the 128 that Linux allows a user by default, and an Envoy that gets none aborts. As root
the limit is raised, and said; otherwise the remedy is told before anything starts.
"""

from __future__ import annotations

import os
from pathlib import Path

LIMIT = Path("/proc/sys/fs/inotify/max_user_instances")
PER_CLOUD = 80
"""Measured with the overlays in istio/clouds: about 60 by one Envoy, and some for the user's other programs."""
WANTED = 1024


class NoRoom(Exception):
    """The limit is too low, and this process may not raise it."""


def make_room(clouds: int) -> str:
    """What was changed, in words; empty when nothing had to be. Raises `NoRoom`."""
    try:
        limit = int(LIMIT.read_text())
    except (OSError, ValueError):
        return ""  # another system than Linux
    needed = clouds * PER_CLOUD
    if limit >= needed:
        return ""
    remedy = f"sysctl fs.inotify.max_user_instances={WANTED}"
    if os.geteuid() == 0:
        try:
            LIMIT.write_text(str(WANTED))
        except OSError as error:
            raise NoRoom(
                f"{clouds} clouds need about {needed} inotify instances, {limit} are allowed: {error}"
            ) from None
        return f"raised fs.inotify.max_user_instances from {limit} to {WANTED}: Envoy needs one per file it follows"
    raise NoRoom(
        f"{clouds} clouds need about {needed} inotify instances, this user may have {limit}: {remedy} (as root)"
    )
