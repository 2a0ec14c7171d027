"""A mesh member that does nothing but be one: health, reflection, metrics, the ready line, drain.

`python -m tests.fakes.member [--fail] [--crash-after SECONDS]` stands in for any service where only its life matters.
"""

from __future__ import annotations

import asyncio
import os
import sys

from services.chassis.serving import Member
from services.chassis.settings import ServiceSettings, read


async def main(arguments: list[str]) -> None:
    member = Member("fake", read(ServiceSettings), [])
    await member.start()
    if "--fail" in arguments:
        print("the fake was told to fail", file=sys.stderr)
        raise SystemExit(7)
    await member.ready()
    if "--crash-after" in arguments:
        delay = float(arguments[arguments.index("--crash-after") + 1])
        asyncio.get_running_loop().call_later(delay, os._exit, 9)
    await member.run()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
