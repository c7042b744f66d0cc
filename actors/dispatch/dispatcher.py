"""The seam between front and experts: dispatch tokens, combine what comes back.

Shapes: T tokens, D hidden, K top-k. A dispatcher knows where experts live; it knows nothing of attention.
"""

from abc import ABC, abstractmethod
from typing import Any, Protocol

import torch
from torch import Tensor

from actors.dispatch.step import Step
from actors.kernels.exchange import NativeSteps


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

    def exchange(self, layer: int, x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """Dispatch and combine."""
        return self.combine(self.dispatch(layer, x_TD, ids_TK, gates_TK))

    def go_through(self, layers: "FrontLayers", number: int, combined_TD: Tensor | None) -> tuple[Tensor, int]:
        """Take a step of a model whose layers are all alike through layer `number`, and maybe further: what the experts
        of the last of them have combined to, and the layer behind it. `combined_TD` is of the layer before.
        """
        h_TD, ids_TK, gates_TK = layers.attend_and_route(number, combined_TD)
        assert ids_TK is not None
        assert gates_TK is not None
        return self.exchange(number, h_TD, ids_TK, gates_TK), number + 1


class FrontLayers(Protocol):
    """One step's front half of all layers, see actors/model/front_layers.py."""

    x_TD: Tensor

    @property
    def num_layers(self) -> int: ...

    def attend_and_route(
        self, number: int, combined_TD: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]: ...

    def chosen(self, place: int) -> Tensor:
        """The experts that layer number `place` of those with experts has chosen, int64."""
        ...

    def native_steps(self) -> NativeSteps | None:
        """The same for a native walk through the layers, or None where they are not native."""
        ...


class NoExperts(Dispatcher):
    """Experts that answer with zeros: what is left is the front's own half."""

    def dispatch(self, layer: int, x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
        return torch.zeros_like(x_TD)

    def combine(self, pending: Tensor) -> Tensor:
        return pending
