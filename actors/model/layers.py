"""The two smallest pieces of the model: RMSNorm and Linear.

Shapes: T tokens, D input width, O output width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from actors.compute import Compute
from actors.packed import FastLinear, WidenedLinear, pack


@dataclass(frozen=True, slots=True)
class Linear:
    weight_OD: Tensor
    bias_O: Tensor | None = None

    def __call__(self, x_TD: Tensor) -> Tensor:
        return F.linear(x_TD, self.weight_OD, self.bias_O)


AnyLinear = Linear | FastLinear


def packed(linear: Linear, compute: Compute) -> AnyLinear:
    """The same matrix in the form that the actor computes with."""
    if compute.linears == "torch":
        return linear
    return pack(linear.weight_OD, linear.bias_O, compute.linears, compute.isa)


def in_place(linear: Linear, compute: Compute) -> AnyLinear:
    """A faster form of a matrix that is needed as it is, too, or small: packed only where nothing else is fast."""
    if compute.linears == "native":
        return packed(linear, compute)
    return WidenedLinear(linear.weight_OD, linear.bias_O) if compute.linears == "widened" else linear


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Normalised in float32, cast back, then scaled by the weight in the model's type."""
    return torch.rms_norm(x_TD.float(), weight_D.shape, None, eps).to(x_TD.dtype) * weight_D
