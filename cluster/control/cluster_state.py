"""What the supervisor tells of the cluster, from what its members are. Plain data, no calls."""

from dataclasses import replace

from cluster.control.fleet import Fleet
from cluster.messages.actors import LoadProgress
from cluster.messages.state import ClusterState, State


def judge(fleet: Fleet) -> tuple[State, str]:
    """State and phase of a cluster that has been brought up. Fronts can compute without replicas, but nothing without
    a front.
    """
    lost = [m.spec.actor_id for m in fleet.members if m.is_lost]
    silent = [m.spec.actor_id for m in fleet.members if m.is_unknown]
    if not lost and not silent:
        return "ready", "ready"
    doing = [f"{what} {', '.join(ids)}" for what, ids in (("restarting", lost), ("waiting for", silent)) if ids]
    return ("degraded" if fleet.of_kind("front", "ready") else "recovering"), "; ".join(doing)


def describe(state: ClusterState, fleet: Fleet, lane: str) -> ClusterState:
    """`state` with all that the fleet knows. `lane` is shown until a front has said which it uses."""
    fronts, version = fleet.of_kind("front"), fleet.expert_map.version
    lane = next((m.report.lane for m in fronts if m.report), lane)
    progress = [m.progress for m in fleet.members]
    return replace(
        state,
        map_version=version,
        fronts=tuple(m.spec.actor_id for m in fronts if m.state == "ready"),
        draining=tuple(m.spec.actor_id for m in fronts if m.state == "draining" or m.is_unknown),
        actors=tuple(member.info(lane, version) for member in fleet.members),
        progress=LoadProgress(sum(p.loaded for p in progress), sum(p.total for p in progress)),
        kv_cache_tokens=sum(m.ready.kv_cache_tokens for m in fleet.members if m.ready),
        max_model_len=fleet.blueprint.engine.max_model_len,
        wanted=fleet.wanted,
    )
