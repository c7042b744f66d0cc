"""The seam between front and experts: dispatch tokens, combine what comes back.

Shapes: T tokens, D hidden, K top-k. A dispatcher knows where experts live; it knows nothing of attention.
"""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor


class Dispatcher(ABC):
    """Computes the expert half of a layer, wherever the experts are.

    dispatch() sends and returns at once; combine() waits. Several layers' or micro-batches' dispatches may be
    open at a time. A dispatcher belongs to one thread.
    """

    @abstractmethod
    def dispatch(self, layer: int, x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor) -> Any:
        """Send each token to the groups that hold its experts. ids: int64 global expert ids; gates: as x."""

    @abstractmethod
    def combine(self, pending: Any) -> Tensor:
        """Sum of gate * expert(x) over each token's experts, shape [T, D], dtype of x."""

    def forget(self, pending: Any) -> None:  # noqa: B027 - nothing to do where nothing was sent
        """Give up what was dispatched and will not be combined."""
