"""What fits where: weights of each actor, and how many sequences the KV cache of a front holds."""

from cluster.planning.layout import Layout
from cluster.planning.workload import ServedModel

GIB = 2**30
# Of a device's memory: what activations, the process itself and others take is the rest.
USABLE = 0.9


def front_weights(model: ServedModel, layout: Layout) -> int:
    """Bytes of one front's weights."""
    return model.sizes.front + (model.sizes.experts if layout.is_local else 0)


def replica_weights(model: ServedModel, layout: Layout) -> float:
    """Bytes of one replica's weights."""
    return 0.0 if layout.is_local else model.sizes.experts / layout.groups


def kv_bytes(model: ServedModel, layout: Layout) -> float:
    """What is left for the cache of each front; below 0 if the weights don't fit."""
    front = USABLE * GIB * layout.front_node.memory_gib
    if layout.is_shared:
        replicas = layout.num_replicas * replica_weights(model, layout)
        return (front - replicas) / layout.fronts - front_weights(model, layout)
    return front - front_weights(model, layout)


def most_sequences(model: ServedModel, layout: Layout, length: int) -> int:
    """Sequences of so many tokens that a front's cache holds at once; 0 if something does not fit."""
    room = USABLE * GIB * layout.replica_node.memory_gib
    if not layout.is_shared and replica_weights(model, layout) > room:
        return 0
    return max(0, int(kv_bytes(model, layout) // (length * model.sizes.kv_per_token)))
