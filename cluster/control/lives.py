"""The life of a member: its actor starts and loads, joins those that serve, and leaves without a failed request."""

import asyncio
import logging
from dataclasses import replace

from cluster.control.actors import first_line
from cluster.control.clock import now
from cluster.control.fleet import Fleet
from cluster.control.members import Member
from cluster.control.reports import HUNG_S, ask
from cluster.messages.actors import ReplicaSpec

logger = logging.getLogger(__name__)

LOAD_LAYER_S = 120.0
STOP_S = 3.0
DRAIN_PERIOD_S = 0.2
# Ingresses learn within a second that a front takes no more requests, and have fetched its last outputs by then.
DRAIN_GRACE_S = 1.5


async def load(fleet: Fleet, member: Member) -> None:
    """Start the member's actor and let it load its weights. Raises as Actors.call."""
    member.spec = replace(member.spec, lane_keys=fleet.blueprint.lane_keys)
    if isinstance(member.spec, ReplicaSpec):  # experts may have moved since the spec was written
        experts = fleet.expert_map.experts_of(member.spec.group)
        member.spec = replace(member.spec, experts=experts)
    member.handle = fleet.actors.create(member.spec, fleet.blueprint.resources)
    started = now()
    member.enter("loading", member.detail)
    member.ready = await fleet.actors.call(member.handle, "load")
    seconds = now() - started
    if member.kind == "expert":
        fleet.metrics.observe("replica_start_seconds", seconds)
    logger.info("%s has loaded %d bytes in %.1f s", member.spec.actor_id, member.ready.weight_bytes, seconds)


async def join(fleet: Fleet, member: Member) -> None:
    """Let a member that has loaded serve: a replica enters the map, a front takes the map. Raises as Actors.call."""
    assert member.ready is not None
    if member.kind == "front":
        await _start_front(fleet, member)
        return
    await _align(fleet, member)  # what takes long holds up nobody else who joins
    async with fleet.placing:
        await _align(fleet, member)
        member.become_ready(member.ready)
        await fleet.publish()


async def _start_front(fleet: Fleet, member: Member) -> None:
    version, legacy = fleet.expert_map.version, fleet.legacy
    assert member.ready is not None
    fronts = [m.ready for m in fleet.of_kind("front") if m is not member and m.handle and m.ready]
    others = tuple(ready.kv_cache_bytes for ready in fronts if ready.node == member.ready.node)
    ready = await fleet.actors.call(member.handle, "start", fleet.expert_map, legacy, others)
    member.become_ready(ready)
    member.told, member.map_version = legacy, version
    if (fleet.expert_map.version, fleet.legacy) != (version, legacy):  # it was not among those that heard of the new
        await fleet.tell(member)


async def _align(fleet: Fleet, member: Member) -> None:
    """Have a replica hold what the map has at home in its group."""
    assert isinstance(member.spec, ReplicaSpec)
    for layer, experts in enumerate(fleet.expert_map.experts_of(member.spec.group)):
        if experts != member.spec.experts[layer]:
            await hold(fleet, member, layer, experts)


async def hold(fleet: Fleet, member: Member, layer: int, experts: tuple[int, ...]) -> None:
    """Have a replica hold exactly these experts of a layer. Raises as Actors.call."""
    await fleet.actors.call(member.handle, "set_experts", layer, experts, timeout=LOAD_LAYER_S)
    member.hold(layer, experts)


async def retire(fleet: Fleet, member: Member, drain_timeout_s: float, is_serving: bool) -> None:
    """End a member that leaves; one that serves leaves without a failed request."""
    if is_serving:
        try:
            await (_drain_front(fleet, member, drain_timeout_s) if member.kind == "front" else _leave_map(fleet))
        except Exception as error:  # it may die while it leaves
            logger.warning("%s did not drain: %s", member.spec.actor_id, first_line(error))
    try:
        await _close_lanes(fleet, [member])
    finally:
        fleet.discard(member)


async def _leave_map(fleet: Fleet) -> None:
    fleet.renew_map()
    await fleet.tell_fronts()  # whoever has made that version: only when fronts have it does nobody send here
    await fleet.settle()


async def _drain_front(fleet: Fleet, member: Member, timeout_s: float) -> None:
    """Wait until its last request has ended. What has not by then is replayed on another front."""
    await fleet.actors.call(member.handle, "drain", timeout=HUNG_S)
    await asyncio.sleep(DRAIN_GRACE_S)
    deadline = now() + timeout_s
    while now() < deadline:
        await ask(fleet, member)
        if member.state != "draining" or member.report is None or member.report.num_requests == 0:
            break
        member.detail = f"{member.report.num_requests} requests left"
        await asyncio.sleep(DRAIN_PERIOD_S)
    await asyncio.sleep(DRAIN_GRACE_S)


async def end_all(fleet: Fleet) -> None:
    await _close_lanes(fleet, fleet.of_kind("expert", "ready"))
    for member in fleet.members:
        fleet.kill(member)
        member.enter("dead", "stopped")


async def _close_lanes(fleet: Fleet, members: list[Member]) -> None:
    """Let replicas remove the files of their sockets; a killed process can't."""
    there = [m for m in members if m.kind == "expert" and m.handle and m.ready]
    closing = [fleet.actors.call(m.handle, "stop", timeout=STOP_S) for m in there]
    for result in await asyncio.gather(*closing, return_exceptions=True):
        if isinstance(result, TimeoutError):
            logger.warning("a replica did not close its lane in %g s", STOP_S)
