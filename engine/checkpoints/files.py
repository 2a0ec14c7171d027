"""Opens a model directory's files as what they are: data from strangers.

Only regular files are read (a link to one is fine, model hubs use them), so no pipe can block the start and no device
can fill the memory, and never more bytes than the caller expects. Everything that is wrong is an OSError.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_regular(path: Path) -> BinaryIO:
    """Opens for reading. Raises OSError when it is not there or no regular file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe without a writer would block
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return open(descriptor, "rb")


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """The whole file. Raises OSError, also when it is larger than `max_bytes`."""
    with open_regular(path) as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise OSError(errno.EFBIG, f"larger than {max_bytes} bytes", str(path))
    return data


def identity(path: Path) -> tuple[int, int, int, int] | None:
    """Changes when the file is replaced or written to; None when it cannot be had."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
