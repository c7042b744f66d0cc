"""Embeddings of whole texts: hidden states behind the last norm, pooled as they are computed, piece by piece.

Shapes: R rows, D hidden.
"""

import torch
from torch import Tensor

from cluster.messages.requests import PoolingKind


class Pooled:
    """The hidden states of a sequence so far: their mean, or the last of them."""

    def __init__(self, kind: PoolingKind) -> None:
        self.kind = kind
        self._total_D: Tensor | None = None
        self._num_rows = 0

    def add(self, rows_RD: Tensor) -> None:
        """The next rows, in order."""
        if self.kind == "last":
            self._total_D, self._num_rows = rows_RD[-1].double(), 1
            return
        # float64: how a text was cut into pieces does not show.
        sum_D = rows_RD.double().sum(dim=0)
        self._total_D = sum_D if self._total_D is None else self._total_D + sum_D
        self._num_rows += len(rows_RD)

    def as_bytes(self) -> bytes:
        """float32 [D]."""
        assert self._total_D is not None
        return (self._total_D / self._num_rows).to(torch.float32).cpu().numpy().tobytes()
