"""The first bring-up of a fleet: all members load side by side, and the first expert map is complete.

An actor that dies over it is started anew, like any other; what is wrong with settings or checkpoint ends it at once.
"""

import asyncio
from collections.abc import Callable

from cluster.control.actors import ActorError, first_line
from cluster.control.fleet import Fleet
from cluster.control.lives import join, load
from cluster.control.members import Member

PROGRESS_PERIOD_S = 0.25
# An actor that dies this often will die again: out of memory, most of the time.
MAX_DEATHS = 3


async def start_all(fleet: Fleet, tell: Callable[[str], None]) -> None:
    """`tell` hears of each phase. Raises ConfigError or ModelError, or an ActorError of a member that keeps dying."""
    fleet.set_wanted(fleet.wanted)
    tell("loading weights")
    progress = asyncio.create_task(_follow_progress(fleet))
    try:
        await asyncio.gather(*(_start(fleet, m, is_to_join=False) for m in fleet.members))
    finally:
        progress.cancel()
    for member in fleet.of_kind("expert"):  # all at once: the first map is complete
        assert member.ready is not None
        member.become_ready(member.ready)
    await fleet.publish()
    tell("warming up")
    await asyncio.gather(*(_start(fleet, m, is_to_join=True) for m in fleet.of_kind("front")))


async def _start(fleet: Fleet, member: Member, is_to_join: bool) -> None:
    for may_die in (*[True] * MAX_DEATHS, False):
        try:
            if member.ready is None:
                await load(fleet, member)
            if is_to_join:
                await join(fleet, member)
            return
        except ActorError as error:
            if not may_die:
                raise
            fleet.replace(member, first_line(error))
        while not member.is_due:
            await asyncio.sleep(PROGRESS_PERIOD_S)
        member.renew()


async def _follow_progress(fleet: Fleet) -> None:
    while True:
        await asyncio.gather(*(_ask_progress(fleet, m) for m in fleet.members if m.handle and m.ready is None))
        await asyncio.sleep(PROGRESS_PERIOD_S)


async def _ask_progress(fleet: Fleet, member: Member) -> None:
    try:
        progress = await fleet.actors.call(member.handle, "progress", timeout=1.0)
    except (TimeoutError, ActorError):
        return  # still starting; a real failure surfaces in load()
    if member.ready is None:
        member.progress = progress
