"""Dispatch without a way to go: all experts in the front's own process."""

import time

from torch import Tensor

from actors.dispatch.dispatcher import Dispatcher
from actors.experts.store import ExpertStore


class LocalDispatcher(Dispatcher):
    """All experts in this process: the oracle of every lane, and the `local` lane itself."""

    def __init__(self, store: ExpertStore) -> None:
        super().__init__()
        self.store = store

    def dispatch(self, layer: int, x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
        started = time.monotonic()
        sum_TD = self.store.run(layer, x_TD, ids_TK, gates_TK)
        seconds = time.monotonic() - started
        self.step.wait_seconds += seconds
        self.step.compute_seconds += seconds
        return sum_TD

    def combine(self, pending: Tensor) -> Tensor:
        return pending
