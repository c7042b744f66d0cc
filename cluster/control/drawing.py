"""The blueprint of a cluster, drawn from its configuration, the checkpoint and what the machine has."""

import asyncio

import zmq

from cluster.config import ClusterConfig
from cluster.messages.actors import FrontSpec, LaneKeys, Machine, ReplicaSpec
from cluster.models.checkpoint import Checkpoint
from cluster.models.hub import local_copy, resolve_model
from cluster.policy.blueprint import Blueprint, draw_blueprint


async def draw(config: ClusterConfig, machine: Machine, known: FrontSpec | ReplicaSpec | None = None) -> Blueprint:
    """`known` is of an actor that a predecessor has left and that is kept: others are to fit it, whatever has become
    of the model on the Hub since. Raises ConfigError or ModelError.
    """
    keys = known.lane_keys if known else None
    model_dir = await asyncio.to_thread(resolve_model, config.model, known.model_path if known else "")
    here = await asyncio.to_thread(local_copy, str(model_dir))
    checkpoint = await asyncio.to_thread(Checkpoint.open, here)
    if keys is None and config.lane in ("auto", "zmq"):
        keys = LaneKeys(*zmq.curve_keypair(), *zmq.curve_keypair())
    return draw_blueprint(config, checkpoint, str(model_dir), machine, keys)
