"""The seam between front and experts: dispatch tokens, combine what comes back.

Shapes: T tokens, D hidden, K top-k. A dispatcher knows where experts live; it knows nothing of attention.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from actors.dispatch.step import Step


class DispatchError(RuntimeError):
    """Nobody could compute some experts; the step can't be finished."""


class Dispatcher(ABC):
    """Computes the expert half of a layer, wherever the experts are.

    dispatch() sends and returns at once; combine() waits. Several dispatches may be open at a time. A
    dispatcher belongs to one thread. It adds to `step`, which the engine sets, what that step costs.
    """

    def __init__(self) -> None:
        self.step = Step()

    @abstractmethod
    def dispatch(self, layer: int, x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor) -> Any:
        """Send each token to the groups that hold its experts. ids: int64 global expert ids; gates: as x."""

    @abstractmethod
    def combine(self, pending: Any) -> Tensor:
        """Sum of gate * expert(x) over each token's experts, shape [T, D], dtype of x."""


class NoExperts(Dispatcher):
    """Experts that answer with zeros: what is left is the front's own half."""

    def dispatch(self, layer: int, x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
        return torch.zeros_like(x_TD)

    def combine(self, pending: Tensor) -> Tensor:
        return pending
