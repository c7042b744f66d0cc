"""Loads experts from a checkpoint: those that an actor holds, and no others.

Shapes: D hidden, F expert hidden, E experts.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

from actors.activations import ACTIVATIONS
from actors.experts.layer_experts import LayerExperts
from actors.experts.store import ExpertStore
from actors.weights import Part, Weights
from cluster.models.checkpoint import expert_shapes


def load_experts(weights: Weights, experts: Sequence[Sequence[int]]) -> ExpertStore:
    """The experts with the given global ids (ascending), layer by layer, of those layers that have experts."""
    assert len(experts) == weights.spec.num_expert_layers
    activation = ACTIVATIONS[weights.spec.activation]
    # Packed one by one, so that only one layer is ever there twice.
    layers = tuple(
        read_layer_experts(weights, layer, tuple(ids)).packed(weights.compute, activation)
        for layer, ids in enumerate(experts)
    )
    return ExpertStore(weights.spec, layers, weights.compute)


def read_layer_experts(weights: Weights, layer: int, ids: tuple[int, ...]) -> LayerExperts:
    """Experts of a layer, of those that have some, as they are stored."""
    shapes = expert_shapes(weights.spec)
    experts = LayerExperts(ids, weights.empty(len(ids), *shapes["gate_up"]), weights.empty(len(ids), *shapes["down"]))
    key = f"layers.{weights.spec.expert_layers[layer]}.experts."
    is_stacked = f"{key}gate_up" in weights.checkpoint.tensors
    weights.read_parts(list(_stacked(experts, key) if is_stacked else _one_by_one(experts, key)))
    return experts


def _stacked(experts: LayerExperts, key: str) -> Iterator[Part]:
    for name, out in (("gate_up", experts.gate_up_EFD), ("down", experts.down_EDF)):
        for row, first, length in contiguous_runs(experts.ids):
            yield out[row : row + length], f"{key}{name}", first


def _one_by_one(experts: LayerExperts, key: str) -> Iterator[Part]:
    width = experts.down_EDF.shape[2]
    for row, expert in enumerate(experts.ids):
        yield experts.gate_up_EFD[row, :width], f"{key}{expert}.gate", 0
        yield experts.gate_up_EFD[row, width:], f"{key}{expert}.up", 0
        yield experts.down_EDF[row], f"{key}{expert}.down", 0


def contiguous_runs(ids: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(position in ids, first id, length) of each run of consecutive ids: 3 4 5 9 -> (0, 3, 3), (3, 9, 1)."""
    starts = [at for at, expert in enumerate(ids) if at == 0 or expert != ids[at - 1] + 1]
    for start, end in pairwise([*starts, len(ids)]):
        yield start, ids[start], end - start
