"""Rebalances a running fleet by recent load, layer by layer: load first, publish second, retire third."""

import asyncio
import logging
import time
from collections import Counter
from dataclasses import replace

from cluster.config import ClusterConfig
from cluster.control.actors import DeadActorError
from cluster.control.clock import now
from cluster.control.fleet import Fleet
from cluster.control.lives import hold
from cluster.control.members import Member
from cluster.expert_map import ExpertMap
from cluster.messages.state import RebalanceReport
from cluster.policy.expert_load import ExpertLoad
from cluster.policy.placement import RebalancePlan, plan_rebalance

logger = logging.getLogger(__name__)

MIB = 2**20


class RebalanceError(RuntimeError):
    """A layer could not be moved; the layers before it are, and the map says so."""


class Rebalancer:
    """One rebalance at a time; by itself if `rebalance_interval_s` says so."""

    def __init__(self, config: ClusterConfig, expert_load: ExpertLoad) -> None:
        self._config = config
        self._expert_load = expert_load
        self._lock = asyncio.Lock()
        self.wait_for_next()

    @property
    def is_due(self) -> bool:
        return self._config.rebalance_interval_s is not None and now() >= self._due_at

    def wait_for_next(self) -> None:
        """Be due again after one more interval."""
        self._due_at = now() + (self._config.rebalance_interval_s or 0)

    async def rebalance(self, fleet: Fleet, dry_run: bool, force: bool) -> RebalanceReport:
        """Move experts to where recent load wants them, or tell what that would be. `force` takes every improvement,
        however balanced the load is already.
        """
        if dry_run:
            return _report(self._plan(fleet, force), fleet, is_dry_run=True)
        if self._lock.locked():
            return RebalanceReport(False, error="another rebalance is running", map_version=fleet.expert_map.version)
        async with self._lock:
            started, error = now(), ""
            plan = self._plan(fleet, force)
            if plan.is_worthwhile:
                try:
                    await carry_out(plan, fleet, self._config.rebalance_mib_per_s)
                except RebalanceError as failure:
                    error = str(failure)
            return replace(_report(plan, fleet), error=error, seconds=now() - started)

    def _plan(self, fleet: Fleet, force: bool) -> RebalancePlan:
        return plan_rebalance(
            self._expert_load.recent,
            fleet.expert_map.homes,
            slots_per_layer=fleet.blueprint.slots_per_layer,
            bytes_per_expert=fleet.blueprint.bytes_per_expert,
            replicas=[len(members) for members in fleet.ready_by_group().values()],
            **({"threshold": 1.0, "min_gain": 0.0} if force else {"threshold": self._config.rebalance_threshold}),
        )


def most_loaded(plan: RebalancePlan) -> Counter[int]:
    """By layer, how many experts the group that gets the most has to load."""
    most = Counter[int]()
    for (layer, _), count in Counter((move.layer, move.group) for move in plan.moves).items():
        most[layer] = max(most[layer], count)
    return most


def _report(plan: RebalancePlan, fleet: Fleet, is_dry_run: bool = False) -> RebalanceReport:
    return RebalanceReport(
        is_dry_run,
        plan.before,
        plan.after,
        len(plan.changed_layers),
        len(plan.moves),
        plan.bytes_to_move,
        plan.reason,
        map_version=fleet.expert_map.version,
    )


async def carry_out(plan: RebalancePlan, fleet: Fleet, mib_per_s: float | None = None) -> None:
    """A replica that loads serves more slowly meanwhile: each loads no more than so many MiB in a second, over a layer
    or more. Raises RebalanceError when a replica can't load its experts; every expert is served all the time.
    """
    started = rested = now()
    most = most_loaded(plan)
    for layer in plan.changed_layers:
        async with fleet.placing:
            await _move_layer(fleet, layer, plan.homes[layer])
        if mib_per_s:  # others may join meanwhile
            rested = max(now(), rested + most[layer] * fleet.blueprint.bytes_per_expert / (MIB * mib_per_s))
            await asyncio.sleep(rested - now())
    seconds = now() - started
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
        await _hold_all(fleet, layer, both)
    except RebalanceError:
        await _hold_all(fleet, layer, _held(before, layer), is_needed=False)
        raise
    await fleet.publish_homes(layer, homes)
    await _hold_all(fleet, layer, _held(after, layer), is_needed=False)


def _held(expert_map: ExpertMap, layer: int) -> list[tuple[int, ...]]:
    """By group, what its replicas hold of a layer."""
    return [expert_map.experts_of(group)[layer] for group in range(expert_map.num_groups)]


async def _hold_all(fleet: Fleet, layer: int, experts: list[tuple[int, ...]], is_needed: bool = True) -> None:
    """Have all live replicas hold their group's `experts`. One that dies meanwhile is replaced by one that loads by
    the map. Raises RebalanceError if one fails otherwise, unless the experts are only fewer than before.
    """
    members = [m for m in fleet.of_kind("expert", "ready") if _holds_other(m, layer, experts)]
    results = await asyncio.gather(*(_tell(fleet, m, layer, experts) for m in members), return_exceptions=True)
    for member, result in zip(members, results, strict=True):
        if isinstance(result, Exception) and not isinstance(result, DeadActorError):
            logger.warning("%s can't change layer %d: %s", member.spec.actor_id, layer, result or "no answer")
            if is_needed:
                raise RebalanceError(f"{member.spec.actor_id} could not load experts of layer {layer}: {result!r}")


def _holds_other(member: Member, layer: int, experts: list[tuple[int, ...]]) -> bool:
    return member.held(layer) != experts[member.group or 0]


async def _tell(fleet: Fleet, member: Member, layer: int, experts: list[tuple[int, ...]]) -> None:
    if member.handle:  # else it has died meanwhile: its successor loads by the map
        await hold(fleet, member, layer, experts[member.group or 0])
