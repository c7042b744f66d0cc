"""Carries a placement plan out on a running fleet, layer by layer: load first, publish second, retire third."""

import asyncio
import logging
import time
from typing import Any

from ray.exceptions import RayActorError

from cluster.expert_map import ExpertMap
from cluster.fleet import LOAD_LAYER_S, Fleet
from cluster.members import Member
from cluster.placement import Plan
from cluster.ray_actors import answer

logger = logging.getLogger(__name__)


class RebalanceError(RuntimeError):
    """A layer could not be moved; the layers before it are, and the map says so."""


async def carry_out(plan: Plan, fleet: Fleet) -> None:
    """Raises RebalanceError when a replica can't load its experts; every expert is served all the time."""
    started = time.monotonic()
    for layer in plan.changed_layers:
        async with fleet.placing:
            await _move_layer(fleet, layer, plan.homes[layer])
    seconds = time.monotonic() - started
    fleet.metrics.inc("rebalances_total")
    fleet.metrics.observe("rebalance_seconds", seconds)
    fleet.metrics.set("last_rebalance_timestamp_seconds", time.time())
    logger.info(
        "rebalanced %d layers in %.1f s: balancedness %.3f -> %.3f, %d experts moved",
        *(len(plan.changed_layers), seconds, plan.before, plan.after, len(plan.moves)),
    )


async def _move_layer(fleet: Fleet, layer: int, homes: tuple[tuple[int, ...], ...]) -> None:
    before, after = fleet.expert_map, fleet.expert_map.with_homes(layer, homes)
    both = [tuple(sorted({*old, *new})) for old, new in zip(_held(before, layer), _held(after, layer), strict=True)]
    try:
        await _hold(fleet, layer, both)
    except RebalanceError:
        await _hold(fleet, layer, _held(before, layer), is_needed=False)
        raise
    await fleet.publish_homes(layer, homes)
    await _hold(fleet, layer, _held(after, layer), is_needed=False)


def _held(expert_map: ExpertMap, layer: int) -> list[tuple[int, ...]]:
    """By group, what its replicas hold of a layer."""
    return [expert_map.experts_of(group)[layer] for group in range(expert_map.num_groups)]


async def _hold(fleet: Fleet, layer: int, experts: list[tuple[int, ...]], is_needed: bool = True) -> None:
    """Have all live replicas hold their group's `experts`. One that dies meanwhile is replaced by one that loads by
    the map. Raises RebalanceError if one fails otherwise, unless the experts are only fewer than before.
    """
    members = [m for m in fleet.of_kind("expert", "ready") if _holds_other(m, layer, experts)]
    results = await asyncio.gather(*(_tell(m, layer, experts) for m in members), return_exceptions=True)
    for member, result in zip(members, results, strict=True):
        if isinstance(result, Exception) and not isinstance(result, RayActorError):
            logger.warning("%s can't change layer %d: %s", member.spec.actor_id, layer, result or "no answer")
            if is_needed:
                raise RebalanceError(f"{member.spec.actor_id} could not load experts of layer {layer}: {result!r}")


def _holds_other(member: Member, layer: int, experts: list[tuple[int, ...]]) -> bool:
    return member.held(layer) != experts[member.group or 0]


async def _tell(member: Member, layer: int, experts: list[tuple[int, ...]]) -> Any:
    wanted = experts[member.group or 0]
    await answer(member.handle.set_experts.remote(layer, wanted), LOAD_LAYER_S)
    member.hold(layer, wanted)
