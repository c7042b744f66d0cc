"""What a new supervisor does with the actors that one before it has left.

It keeps what lives first and asks afterwards whether that fits the configuration: an actor serves on whatever else is
wrong. Silence says nothing about an actor until it lasts so long that the actor counts as hung.
"""

import asyncio
import logging
from contextlib import suppress
from dataclasses import dataclass, replace

from cluster.actor_id import ActorId
from cluster.control.actors import ActorError, Actors, DeadActorError, Handle, first_line
from cluster.control.fleet import Fleet
from cluster.control.lives import join
from cluster.control.members import LONGEST_PAUSE_S, Member
from cluster.control.reports import HUNG_S, REPORT_TIMEOUT_S
from cluster.expert_map import ExpertMap
from cluster.messages.actors import FrontSpec, Identity, ReplicaSpec
from cluster.policy.blueprint import Blueprint, recall_blueprint

logger = logging.getLogger(__name__)

ASK_PAUSE_S = 0.5


@dataclass(frozen=True, slots=True)
class Found:
    """A live actor. `identity` is None for one that is silent, and for one that can't serve yet."""

    name: str
    handle: Handle
    identity: Identity | None = None
    is_silent: bool = False

    @property
    def is_of_use(self) -> bool:
        return self.is_silent or self.identity is not None


async def find(actors: Actors) -> list[Found]:
    """The actors that live."""
    found = await asyncio.gather(*(ask(actors, name, handle) for name, handle in actors.named().items()))
    return [actor for actor in found if actor]


async def ask(actors: Actors, name: str, handle: Handle) -> Found | None:
    """Who a live actor is; None if it is dead."""
    try:
        return Found(name, handle, await actors.call(handle, "identity", timeout=REPORT_TIMEOUT_S))
    except DeadActorError:
        return None
    except (TimeoutError, ActorError) as error:
        logger.warning("%s does not say who it is: %s", name, first_line(error))
    return Found(name, handle, is_silent=True)


def newest(found: list[Found]) -> Identity | None:
    """Of the front with the newest expert map; without a front that answers, of a replica."""
    known = [actor.identity for actor in found if actor.identity]
    return max(known, key=lambda k: k.expert_map.version if k.expert_map else -1, default=None)


def recall(known: Identity | None) -> Blueprint | None:
    if known and known.expert_map and known.legacy and isinstance(known.spec, FrontSpec):
        return recall_blueprint(known.spec, known.expert_map, known.legacy.wanted)
    return None


def restarts(expert_map: ExpertMap) -> dict[str, int]:
    """By slot, of the replicas that a predecessor knew: a successor of one that was lost gets a name of its own."""
    known = [ActorId.parse(address.replica_id) for address in expert_map.replicas]
    return {actor_id.slot: actor_id.restart for actor_id in known}


def adopt(fleet: Fleet, found: list[Found]) -> list[Member]:
    """Make every live actor a member, in whatever slot it is; returns fronts that were leaving already. Those that
    can't serve yet are ended, since nobody waits for them any more, and those in whose slot a newer one lives.
    """
    kept: dict[str, tuple[ActorId, Found]] = {}
    for actor_id, actor in _in_order(found):
        if actor.is_of_use and (actor_id.group or 0) < fleet.expert_map.num_groups:
            kept[actor_id.slot] = actor_id, actor
    names = {actor.name for _, actor in kept.values()}
    end(fleet.actors, [actor for actor in found if actor.name not in names])
    for actor_id, actor in kept.values():
        fleet.members.append(_member(fleet, actor_id, actor))
    leaving = {a.name for _, a in kept.values() if a.identity and a.identity.is_draining}
    return [m for m in fleet.members if m.spec.actor_id in leaving]


def _in_order(found: list[Found]) -> list[tuple[ActorId, Found]]:
    """Those that are called as ours are: fronts first, and of a slot the newest actor last."""
    named = []
    for actor in found:
        with suppress(ValueError):
            named.append((ActorId.parse(actor.name), actor))
    return sorted(
        named, key=lambda pair: (-1 if pair[0].group is None else pair[0].group, pair[0].index, pair[0].restart)
    )


def end(actors: Actors, found: list[Found]) -> None:
    for actor in found:
        logger.info("%s of a predecessor is ended", actor.name)
        actors.end(actor.handle)


def _member(fleet: Fleet, actor_id: ActorId, actor: Found) -> Member:
    spec = replace(fleet.spec(actor_id.group, actor_id.index), actor_id=actor.name)
    member = Member(spec, actor_id.kind, handle=actor.handle, num_restarts=actor_id.restart)
    if actor.identity:
        _learn_keys(fleet, actor.identity.spec)
        _recognise(fleet, member, actor.identity)
    else:
        member.enter("starting", "no answer yet")
    return member


def _learn_keys(fleet: Fleet, spec: FrontSpec | ReplicaSpec) -> None:
    """The first actor that tells by what keys its lane opens tells those of all: who is started next gets them, too."""
    if not any(m.ready or m.state == "loading" for m in fleet.members):
        fleet.blueprint = replace(fleet.blueprint, lane_keys=spec.lane_keys)


def _recognise(fleet: Fleet, member: Member, identity: Identity) -> None:
    """A replica that lacks experts which its group has by the map must load them first: see settle."""
    member.spec, member.ready, member.silent_since = identity.spec, identity.ready, None
    member.told = identity.legacy
    if identity.legacy and not fleet.gone:  # every front has the same
        fleet.keep(identity.legacy.counted)
    if identity.expert_map:
        fleet.expert_map = _newer(fleet.expert_map, identity.expert_map)
    if member.kind == "front" or _holds_enough(member, fleet.expert_map):
        member.become_ready(identity.ready)
        logger.info("%s of a predecessor is kept", member.spec.actor_id)


def _newer(ours: ExpertMap, known: ExpertMap) -> ExpertMap:
    """Our map, with a version that a front which knows another one takes for newer."""
    return ours if known == ours or known.version < ours.version else replace(ours, version=known.version + 1)


def _holds_enough(member: Member, expert_map: ExpertMap) -> bool:
    assert isinstance(member.spec, ReplicaSpec)
    homes, held = expert_map.experts_of(member.spec.group), member.spec.experts
    return homes == held or (
        len(homes) == len(held) and all(set(home) <= set(here) for home, here in zip(homes, held, strict=True))
    )


async def settle(fleet: Fleet, member: Member) -> bool:
    """Return once an actor that lives serves again, or is lost: a silent one is asked until it answers or counts as
    hung, a replica loads the experts that it lacks. True for a front that was leaving already.

    Meanwhile others may give the actor up and start its successor: what is learnt of the one says nothing of the other.
    """
    handle, pause, is_leaving = member.handle, ASK_PAUSE_S, False
    while member.state == "starting" and member.handle is handle:
        try:
            if member.ready is None:
                is_leaving = await _ask_again(fleet, member)
            else:
                await join(fleet, member)
        except Exception as error:
            if member.handle is not handle:
                break
            if isinstance(error, DeadActorError):
                fleet.bury(member, first_line(error))
            elif isinstance(error, TimeoutError):  # its process may answer, but not the thread that loads
                fleet.replace(member, "hung while it loaded experts")
            else:
                member.detail = f"{first_line(error)}; next attempt in {pause:g} s"
                logger.warning("%s: %s", member.spec.actor_id, member.detail)
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
    return is_leaving


async def _ask_again(fleet: Fleet, member: Member) -> bool:
    """As settle."""
    handle = member.handle
    found = await ask(fleet.actors, member.spec.actor_id, handle)
    if member.handle is not handle:
        return False
    if found is None or not found.is_of_use:
        fleet.replace(member, "it was not ready" if found else "it has died")
    elif found.identity is None:
        silent = member.hear(None)
        member.detail = f"no answer for {silent:.0f} s"
        if silent > HUNG_S:
            fleet.replace(member, "hung")
        await asyncio.sleep(ASK_PAUSE_S)
    else:
        _hear(fleet, member, found.identity)
        return found.identity.is_draining
    return False


def _hear(fleet: Fleet, member: Member, identity: Identity) -> None:
    _learn_keys(fleet, identity.spec)
    if fleet.is_checked and not identity.spec.fits(member.spec):
        fleet.replace(member, "it does not fit the configuration")
    elif identity.spec.lane_keys != fleet.blueprint.lane_keys:
        fleet.replace(member, "its lane does not open to the others")
    else:
        _recognise(fleet, member, identity)


def check(fleet: Fleet, blueprint: Blueprint) -> bool:
    """Go on by a blueprint that was drawn: members that don't fit it are replaced. False if none fits."""
    ours, wanted = fleet.expert_map, blueprint.expert_map
    is_same_shape = (ours.num_groups, len(ours.homes), len(ours.homes[0])) == (
        wanted.num_groups,
        len(wanted.homes),
        len(wanted.homes[0]),
    )
    drawn = [blueprint.front(0) if m.group is None else blueprint.replica(m.group, 0, ours) for m in fleet.members]
    fits = [is_same_shape and m.spec.fits(spec) for m, spec in zip(fleet.members, drawn, strict=True)]
    if not any(fits):
        return False
    fleet.blueprint = replace(blueprint, lane_keys=fleet.blueprint.lane_keys or blueprint.lane_keys)
    fleet.is_checked = True
    for member, spec, is_fit in zip(fleet.members, drawn, fits, strict=True):
        if not is_fit and not member.is_leaving:
            member.spec = replace(spec, actor_id=member.spec.actor_id)
            fleet.replace(member, "it does not fit the configuration")
    return True
