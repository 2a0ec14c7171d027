"""Becomes another program that dies with its parent: `python -I -S launch.py PARENT_PID program arguments…`.

Run as a file in front of every supervised process. A prctl survives exec, so even `kill -9` of the supervisor leaves
nothing behind. Doing this between fork and exec inside the supervisor would be unsafe: it has threads.
Only Linux has the call; elsewhere the program simply starts.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(parent: int, command: list[str]) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before the prctl
            raise SystemExit(1)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"cannot start {command[0]}: {error.strerror}", file=sys.stderr)
        raise SystemExit(127) from None


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
