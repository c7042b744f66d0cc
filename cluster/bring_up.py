"""The first bring-up of a fleet: all members load side by side, and the first expert map is complete."""

import asyncio
from collections.abc import Callable

from ray.exceptions import RayError

from cluster.fleet import Fleet
from cluster.members import Member
from cluster.ray_actors import answer

PROGRESS_PERIOD_S = 0.25


async def start_all(fleet: Fleet, tell: Callable[[str], None]) -> None:
    """`tell` hears of each phase. Raises what a member raises over its start."""
    fleet.set_wanted(fleet.wanted)
    tell("loading weights")
    progress = asyncio.create_task(_follow_progress(fleet))
    try:
        await asyncio.gather(*(fleet.load(m) for m in fleet.members))
    finally:
        progress.cancel()
    for member in fleet.of_kind("expert"):  # all at once: the first map is complete
        assert member.ready is not None
        member.become_ready(member.ready)
    await fleet.publish()
    tell("warming up")
    await asyncio.gather(*(fleet.join(m) for m in fleet.of_kind("front")))


async def _follow_progress(fleet: Fleet) -> None:
    while True:
        await asyncio.gather(*(_ask_progress(m) for m in fleet.members if m.handle and m.ready is None))
        await asyncio.sleep(PROGRESS_PERIOD_S)


async def _ask_progress(member: Member) -> None:
    try:
        progress = await answer(member.handle.progress.remote(), 1.0)
    except (TimeoutError, RayError):
        return  # still starting; a real failure surfaces in load()
    if member.ready is None:
        member.progress = progress
