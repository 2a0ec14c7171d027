"""`python -m services`: the one program that an image holds, named by AUTOGLM_SERVICE, as process 1 of its container.

Process 1 gets no default action for signals: until the program has its own handler (a worker may load its model for
minutes before), SIGTERM would be lost and the container killed only when its grace is over. Nothing is lost by ending.
"""

from __future__ import annotations

import os
import re
import runpy
import signal
import socket
import sys

ENDED_BY_SIGTERM = 128 + signal.SIGTERM


def main() -> None:
    name = os.environ.get("AUTOGLM_SERVICE", "")
    if not re.fullmatch(r"[a-z_]{1,64}", name):
        print(f"AUTOGLM_SERVICE: {name!r} is not the name of a folder below services/", file=sys.stderr)
        raise SystemExit(2)
    os.environ.setdefault("AUTOGLM_INSTANCE", socket.gethostname()[:64])  # the container's or the pod's own name
    signal.signal(signal.SIGTERM, lambda *_: os._exit(ENDED_BY_SIGTERM))
    runpy.run_module(f"services.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
