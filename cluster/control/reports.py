"""How members are: each that serves is asked for a report, and one that is dead, hung or stuck is given up."""

import asyncio
from collections import defaultdict

from cluster.control.actors import ActorError, DeadActorError, UnreachableActorError, first_line
from cluster.control.clock import now
from cluster.control.fleet import Fleet
from cluster.control.members import Member
from cluster.messages.actors import ActorReport

REPORT_TIMEOUT_S = 2.0
# A process that says nothing for this long is replaced.
HUNG_S = 15.0
# So is a front whose engine does not get on. A step in which it computes experts itself may take long.
STUCK_S = 120.0


# A call costs a supervisor about as much as it takes to read ten reports: of a node with more replicas than this, one
# replica asks the others.
MOST_ASKED_APART = 4
# It waits half a second for the others. One that has failed at it is spared for a while: what it can't do is no reason
# to wait for it in every round.
NODE_TIMEOUT_S, SPARED_S = 1.0, 30.0


async def collect(fleet: Fleet) -> None:
    """Hear of every member that serves; bury those that are dead."""
    apart, by_node = list[Member](), defaultdict[str, list[Member]](list)
    for member in fleet.members:
        if member.state == "ready" and member.kind == "expert" and member.ready and member.silent_since is None:
            by_node[member.ready.node].append(member)
        elif member.state in ("ready", "draining"):
            apart.append(member)
    together = [members for members in by_node.values() if len(members) > MOST_ASKED_APART]
    apart += [m for members in by_node.values() if len(members) <= MOST_ASKED_APART for m in members]
    await asyncio.gather(*(ask(fleet, m) for m in apart), *(_ask_node(fleet, members) for members in together))


async def _ask_node(fleet: Fleet, members: list[Member]) -> None:
    """One replica of a node asks the others. Who has not answered it, and it itself, is asked as ever: what is to
    become of a member is decided in one place.
    """
    speaker = next((m for m in members if m.speaks_from <= now()), None)
    if speaker is None:
        await asyncio.gather(*(ask(fleet, m) for m in members))
        return
    others = [m for m in members if m is not speaker]
    handles, names = [m.handle for m in others], tuple(m.spec.actor_id for m in others)
    try:
        reports = await fleet.actors.call(speaker.handle, "reports", names, timeout=NODE_TIMEOUT_S)
    except (TimeoutError, ActorError):
        reports = [None] * len(others)
        speaker.speaks_from = now() + SPARED_S
    missing = [speaker]
    for member, handle, report in zip(others, handles, reports, strict=True):
        if report is None:
            missing.append(member)
        elif member.handle is handle:
            _hear(fleet, member, report)
    await asyncio.gather(*(ask(fleet, m) for m in missing))


async def ask(fleet: Fleet, member: Member) -> None:
    handle = member.handle
    if handle is None:  # it has died meanwhile
        return
    try:
        report = await fleet.actors.call(handle, "report", timeout=REPORT_TIMEOUT_S)
    except (TimeoutError, UnreachableActorError):
        report = None
    except DeadActorError as error:
        if member.handle is handle:
            _lose(fleet, member, first_line(error))
        return
    except ActorError as error:  # it lives, though it can't say how it is
        member.detail = f"no report: {first_line(error)}"
        return
    if member.handle is handle:  # else it has been replaced meanwhile
        _hear(fleet, member, report)


def _hear(fleet: Fleet, member: Member, report: ActorReport | None) -> None:
    silent = member.hear(report)
    if report is None:
        member.detail = f"no answer for {silent:.0f} s"
        if silent > HUNG_S:
            _give_up(fleet, member, "hung")
    elif report.stuck_seconds > STUCK_S:
        _give_up(fleet, member, f"stuck: what it computes has not ended for {report.stuck_seconds:.0f} s")
    elif member.state == "ready":
        member.detail = ""


def _give_up(fleet: Fleet, member: Member, why: str) -> None:
    """End a member that lives and does not work; it is replaced unless it was leaving."""
    fleet.kill(member)
    _lose(fleet, member, why)


def _lose(fleet: Fleet, member: Member, why: str) -> None:
    if member.state == "draining":
        member.enter("dead", why)  # whoever drains it sees that, and discards it
    elif member.state == "ready":
        fleet.bury(member, why)
