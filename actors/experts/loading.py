"""Loads experts from a checkpoint: those that an actor holds, and no others.

Shapes: D hidden, F expert hidden, E experts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

from actors.activations import ACTIVATIONS
from actors.experts.layer_experts import AnyExperts, LayerExperts
from actors.experts.store import ExpertStore
from actors.weights import Part, Weights
from cluster.models.checkpoint import expert_shapes


def load_experts(weights: Weights, experts: Sequence[Sequence[int]]) -> ExpertStore:
    """The experts with the given global ids (ascending), layer by layer, of those layers that have experts."""
    assert len(experts) == weights.spec.num_expert_layers
    activation = ACTIVATIONS[weights.spec.activation]
    layers: list[AnyExperts] = []
    spare: LayerExperts | None = None
    # Packed one by one, so that only one layer is ever there twice, and in the same place.
    for layer, ids in enumerate(experts):
        plain = read_layer_experts(weights, layer, tuple(ids), spare)
        layers.append(plain.packed(weights.compute, activation))
        spare = None if layers[-1] is plain else plain
    return ExpertStore(weights.spec, tuple(layers), weights.compute)


def read_layer_experts(
    weights: Weights, layer: int, ids: tuple[int, ...], spare: LayerExperts | None = None
) -> LayerExperts:
    """Experts of a layer, of those that have some, as they are stored; in the memory of as many `spare` ones."""
    shapes = expert_shapes(weights.spec)
    if spare is not None and len(spare.ids) == len(ids):
        experts = replace(spare, ids=ids)
    else:
        gate_up_EFD, down_EDF = (weights.empty(len(ids), *shapes[name]) for name in ("gate_up", "down"))
        experts = LayerExperts(ids, gate_up_EFD, down_EDF)
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
