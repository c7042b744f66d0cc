"""The two smallest pieces of the model: RMSNorm and Linear.

Shapes: T tokens, D input width, O output width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from actors.kernels.packed import PackedLinear, can_pack, pack


@dataclass(frozen=True, slots=True)
class Linear:
    weight_OD: Tensor
    bias_O: Tensor | None = None

    def __call__(self, x_TD: Tensor) -> Tensor:
        return F.linear(x_TD, self.weight_OD, self.bias_O)


def packed_if_possible(linear: Linear) -> Linear | PackedLinear:
    """The same matrix in a faster layout, where there is one."""
    return pack(linear.weight_OD, linear.bias_O) if can_pack(linear.weight_OD) else linear


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Normalised in float32, cast back, then scaled by the weight in the model's type."""
    return torch.rms_norm(x_TD.float(), weight_D.shape, None, eps).to(x_TD.dtype) * weight_D
