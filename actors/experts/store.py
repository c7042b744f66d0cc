"""The experts' half of the model: stateless, same inputs, same outputs.

Knows the experts that it holds and which global experts they are; knows nothing of routing, requests or other replicas.

Shapes: T tokens, D hidden, K top-k, E experts held of a layer.
"""

import torch
from torch import Tensor

from actors.activations import ACTIVATIONS
from actors.compute import Compute
from actors.experts.layer_experts import AnyExperts, Choices
from actors.staging import Staging, staging_for
from cluster.models.spec import ModelSpec

SKIP = -1


class NotHeld(LookupError):  # noqa: N818 - an answer, not a failure
    """An expert was asked for that is not here: the sender's expert map is out of date."""

    def __init__(self, layer: int, expert: int) -> None:
        super().__init__(f"expert {expert} of layer {layer} is not held here")
        self.layer = layer
        self.expert = expert


class ExpertStore:
    def __init__(
        self,
        spec: ModelSpec,
        layers: tuple[AnyExperts, ...],
        compute: Compute,
        staging: Staging | None = None,
    ) -> None:
        self.spec = spec
        self.layers = list(layers)
        self.compute = compute
        self.activation = ACTIVATIONS[spec.activation]
        self.staging = staging or staging_for(compute.device)
        self._rows = [self._row_table(layer.ids) for layer in layers]
        self._rows_there = [table.to(compute.device) for table in self._rows]

    @property
    def held(self) -> tuple[tuple[int, ...], ...]:
        """Per layer, the global ids of the experts that are here."""
        return tuple(layer.ids for layer in self.layers)

    def replace(self, layer: int, experts: AnyExperts) -> None:
        """Hold these experts of a layer from now on. Must not run while run() does."""
        self.layers[layer], self._rows[layer] = experts, self._row_table(experts.ids)
        self._rows_there[layer] = self._rows[layer].to(self.compute.device)

    def run(self, layer: int, x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """Sum of gate * expert(x) over those of each token's choices that are not -1, [T, D] in the type of x.

        ids are global expert ids, int64. Sums are kept in float32. Raises NotHeld, but not where ids are on a GPU: to
        look at them would be to wait for it, and a front that has them there holds all experts.

        With ids on the host, x and gates may be there too: the sum is on the store's device in any case.
        """
        rows_TK = self._local_rows(layer, ids_TK)
        if x_TD.device.type != self.compute.device.type:
            x_TD, gates_TK = self.staging.upload(x_TD, gates_TK)
        return self.layers[layer].combine(x_TD, Choices(rows_TK, gates_TK, self.staging), self.activation)

    def _row_table(self, ids: tuple[int, ...]) -> Tensor:
        """Global id -> row. Entry -1 (the last, as an index) stands for skipped choices and maps past the last row;
        ids that are not held map to -1, and so does every number past the last expert."""
        table = torch.full((self.spec.num_experts + 2,), -1)
        table[list(ids)] = torch.arange(len(ids))
        table[SKIP] = len(ids)
        return table

    def _local_rows(self, layer: int, ids_TK: Tensor) -> Tensor:
        if ids_TK.device.type != "cpu":
            return self._rows_there[layer][ids_TK]
        rows_TK = self._rows[layer][ids_TK.clamp(SKIP, self.spec.num_experts)]
        if rows_TK.numel() and int(rows_TK.min()) < 0:
            raise NotHeld(layer, int(ids_TK[rows_TK < 0][0]))
        return rows_TK
