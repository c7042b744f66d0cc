"""An MLP that every token goes through: that of a layer without experts, or the one beside a layer's experts.

Shapes: T tokens, D hidden, F width of the MLP.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.activations import ACTIVATIONS, Activation
from actors.kernels.native import NativeExperts
from actors.model.layers import AnyLinear, Linear, packed
from actors.weights import Weights


class Mlp(ABC):
    @abstractmethod
    def __call__(self, h_TD: Tensor) -> Tensor:
        """down(activation(gate(h)) * up(h)), times the sigmoid of h's product with its gating if it has one."""


@dataclass(frozen=True, slots=True)
class PlainMlp(Mlp):
    """Two matrix products; gate rows come before up rows."""

    gate_up: AnyLinear
    down: AnyLinear
    gating: Linear | None
    activation: Activation

    def __call__(self, h_TD: Tensor) -> Tensor:
        gate_TF, up_TF = self.gate_up(h_TD).chunk(2, dim=-1)
        y_TD = self.down(self.activation(gate_TF) * up_TF)
        return y_TD if self.gating is None else torch.sigmoid(self.gating(h_TD)) * y_TD


@dataclass(frozen=True, slots=True)
class NativeMlp(Mlp):
    """One native call: to the kernel, it is the only expert of a layer."""

    expert: NativeExperts
    gating: Linear | None

    def __call__(self, h_TD: Tensor) -> Tensor:
        rows_T1 = torch.zeros(h_TD.shape[0], 1, dtype=torch.int64)
        gates_T1 = h_TD.new_ones(rows_T1.shape) if self.gating is None else torch.sigmoid(self.gating(h_TD))
        return self.expert.run(h_TD, rows_T1, gates_T1)


def load_mlp(weights: Weights, key: str) -> Mlp:
    """`key` is the beginning of our keys of its tensors, such as `layers.3.shared_`."""
    tensors, compute = weights.checkpoint.tensors, weights.compute
    halves = [f"{key}gate_up"] if f"{key}gate_up" in tensors else [f"{key}gate", f"{key}up"]
    gate_up_FD, down_DF = weights.read_stacked(*halves), weights.read(f"{key}down")
    gating = Linear(weights.read(f"{key}gating")) if f"{key}gating" in tensors else None
    if compute.linears == "native" and weights.spec.activation == "silu":
        return NativeMlp(NativeExperts.of(gate_up_FD[None], down_DF[None], compute.isa), gating)
    gate_up, down = packed(Linear(gate_up_FD), compute), packed(Linear(down_DF), compute)
    return PlainMlp(gate_up, down, gating, ACTIVATIONS[weights.spec.activation])
