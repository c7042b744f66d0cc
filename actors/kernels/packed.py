"""Matrices packed once, at load, into the layout that oneDNN computes with: decode reads them up to twice as fast.

bfloat16 on the CPU only; the plain matrices are the oracle (tests/unit/test_packed.py). Packing keeps the size: the
plain matrix can be dropped. Shapes: T tokens, D input width, O output width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """Called as Linear is. `packed` is opaque: it has no plain layout and can't be indexed."""

    packed: Tensor
    bias_O: Tensor | None = None

    def __call__(self, x_TD: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x_TD, self.packed, self.bias_O, "none", [], "")  # type: ignore[no-any-return]


def can_pack(weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def pack(weight_OD: Tensor, bias_O: Tensor | None = None) -> PackedLinear:
    """Raises RuntimeError where can_pack() is False."""
    return PackedLinear(torch.ops.mkldnn._reorder_linear_weight(weight_OD.contiguous(), None), bias_O)
