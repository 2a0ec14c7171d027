"""A mesh member that does nothing but be one: health, reflection, metrics, the ready line, drain.

`python -m tests.fakes.member` stands in for any service where only its life matters.
"""

from __future__ import annotations

import asyncio

from services.chassis.serving import Member
from services.chassis.settings import ServiceSettings, read


async def main() -> None:
    member = Member("fake", read(ServiceSettings), [])
    await member.start()
    await member.ready()
    await member.run()


if __name__ == "__main__":
    asyncio.run(main())
