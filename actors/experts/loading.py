"""Loads experts from a checkpoint: those that an actor holds, and no others.

Shapes: D hidden, F expert hidden, E experts.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

from torch import Tensor

from actors.experts.layer_experts import ACTIVATIONS, LayerExperts
from actors.experts.store import ExpertStore
from actors.weights import Weights
from cluster.models.checkpoint import layer_shapes


def load_experts(weights: Weights, experts: Sequence[Sequence[int]]) -> ExpertStore:
    """The experts with the given global ids (ascending), layer by layer."""
    assert len(experts) == weights.spec.num_layers
    activation = ACTIVATIONS[weights.spec.activation]
    # Packed one by one, so that only one layer is ever there twice.
    layers = tuple(
        read_layer_experts(weights, layer, tuple(ids)).packed(weights.compute, activation)
        for layer, ids in enumerate(experts)
    )
    return ExpertStore(weights.spec, layers, weights.compute)


def read_layer_experts(weights: Weights, layer: int, ids: tuple[int, ...]) -> LayerExperts:
    """Experts of a layer as they are stored."""
    shapes = layer_shapes(weights.spec)

    def read(name: str) -> Tensor:
        out = weights.empty(len(ids), *shapes[name][1:])
        for row, first, length in contiguous_runs(ids):
            weights.read_into(out[row : row + length], f"layers.{layer}.{name}", first)
        return out

    return LayerExperts(ids, read("gate_up"), read("down"))


def contiguous_runs(ids: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(position in ids, first id, length) of each run of consecutive ids: 3 4 5 9 -> (0, 3, 3), (3, 9, 1)."""
    starts = [at for at, expert in enumerate(ids) if at == 0 or expert != ids[at - 1] + 1]
    for start, end in pairwise([*starts, len(ids)]):
        yield start, ids[start], end - start
