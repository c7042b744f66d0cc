"""Experts computed by a front itself, from the checkpoint, when no replica of their group answers. Slow, but right.

Nothing is kept: each call reads the experts that its tokens need out of the mapped files. The page cache does the rest.
"""

from pathlib import Path

import torch
from torch import Tensor

from actors.experts.store import ACTIVATIONS, ExpertStore
from actors.model.loader import TensorReader, read_layer_experts
from cluster.models.checkpoint import check_checkpoint
from cluster.models.granite_moe import GraniteMoeConfig


class CheckpointExperts:
    def __init__(self, model_dir: Path, config: GraniteMoeConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.config = config
        self.device = device
        self._reader = TensorReader(check_checkpoint(model_dir, config), device, dtype, lambda _: None)

    def run(self, layer: int, x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """As ExpertStore.run, on the CPU side of a dispatch. The same bits as a replica's."""
        needed = tuple(sorted({int(i) for i in ids_TK.unique() if i >= 0}))
        activation = ACTIVATIONS[self.config.hidden_act]
        experts = read_layer_experts(self._reader, self.config, layer, needed).packed(activation)
        store = ExpertStore(self.config, (experts,), self.device)
        moved = (tensor.to(self.device) for tensor in (x_TD, ids_TK, gates_TK))
        return store.run(0, *moved).cpu()
