"""Entry of the `autoglm` command: checks that the `cli` extra is there, then hands over to `autoglm.cli.app`."""

from __future__ import annotations

import importlib.util
import sys

MISSING = "autoglm: the command line needs its extra; install it with: pip install 'autoglm[cli]'"


def main() -> None:
    """Runs the command line and exits with its code."""
    if any(importlib.util.find_spec(name) is None for name in ("typer", "rich")):
        print(MISSING, file=sys.stderr)
        raise SystemExit(2)
    from autoglm.cli.app import run

    raise SystemExit(run())


if __name__ == "__main__":
    main()
