"""Experts computed by a front itself, from the checkpoint, when no replica of their group answers. Slow, but right.

Nothing is kept: each call reads the experts that its tokens need out of the mapped files. The page cache does the rest.
"""

from torch import Tensor

from actors.activations import ACTIVATIONS
from actors.experts.loading import read_layer_experts
from actors.experts.store import ExpertStore
from actors.staging import staging_for
from actors.weights import Weights


class CheckpointExperts:
    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self._staging = staging_for(weights.compute.device)

    def run(self, layer: int, x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """As ExpertStore.run, on the CPU side of a dispatch. The same bits as a replica's."""
        spec, compute = self.weights.spec, self.weights.compute
        needed = tuple(sorted({int(i) for i in ids_TK.unique() if i >= 0}))
        experts = read_layer_experts(self.weights, layer, needed).packed(compute, ACTIVATIONS[spec.activation])
        store = ExpertStore(spec, (experts,), compute, self._staging)
        (sum_TD,) = self._staging.download(store.run(0, x_TD, ids_TK, gates_TK))
        return sum_TD
