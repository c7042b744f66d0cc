"""bfloat16 matrices on a CPU, in the form that the CPU computes fastest with. The plain matrix is the oracle of each
(tests/unit/test_packed.py). Experts may be rounded to int8 on the way: half the bytes, and half the arithmetic.

A matrix is packed once, at load: for our own kernels (native.py), or into the layout that oneDNN computes with where
the CPU has bfloat16 instructions. Packing keeps the size: the plain matrix can be dropped. Without either, torch
computes bfloat16 products row by row of x; from a few rows on it is faster to widen the matrix to float32 piece by
piece. Which form is used is the business of actors/compute.py.

Shapes: T tokens, D input width, O output width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from actors.compute import Compute, Products
from actors.kernels import native
from actors.kernels.native import NativeLinear

# With fewer rows than this, widening costs more than it saves, the more so with several threads that must be woken.
WIDEN_ROWS = 8
# Values of a widened piece: 1 MiB of float32 stays in the caches between being written and being read.
PIECE = 1 << 18
# Rows of int8 with a smaller scale are zeros: its inverse would be no number.
TINY = 1e-37


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """Called as Linear is. `packed` is opaque: it has no plain layout and can't be indexed."""

    packed: Tensor
    bias_O: Tensor | None = None

    def __call__(self, x_TD: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x_TD, self.packed, self.bias_O, "none", [], "")  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class WidenedLinear:
    """Called as Linear is. Sums are float32 throughout, and rounded once."""

    weight_OD: Tensor
    bias_O: Tensor | None = None

    def __call__(self, x_TD: Tensor) -> Tensor:
        if x_TD.shape[0] < WIDEN_ROWS:
            return F.linear(x_TD, self.weight_OD, self.bias_O)
        wide_TD = x_TD.float()
        pieces = self.weight_OD.split(max(1, PIECE // self.weight_OD.shape[1]))
        y_TO = torch.cat([F.linear(wide_TD, piece.float()) for piece in pieces], dim=1)
        if self.bias_O is not None:
            y_TO += self.bias_O
        return y_TO.to(x_TD.dtype)


@dataclass(frozen=True, slots=True)
class Int8Linear:
    """Called as Linear is, without bias: symmetric int8 weights, a scale per output; x is rounded likewise, a scale per
    token. What the native kernels compute (tiles_int8.cpp), in torch: their oracle, and the way where they are missing.
    """

    weight_OD: Tensor
    scale_O: Tensor

    @classmethod
    def of(cls, weight_OD: Tensor) -> "Int8Linear":
        return cls(*quantise(weight_OD))

    def __call__(self, x_TD: Tensor) -> Tensor:
        x8_TD, scale_T = quantise(x_TD)
        sums_TO = x8_TD.int() @ self.weight_OD.int().T  # torch._int_mm is wrong on some CPUs for an inner size of 1
        return (sums_TO.float() * scale_T[:, None] * self.scale_O).to(x_TD.dtype)


def quantise(x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 [T, D], float32 scales [T]): x is about int8 * scale. A row that is not finite has the scale NaN."""
    x_TD = x_TD.float()
    scale_T = x_TD.abs().amax(1) / 127
    scale_T = torch.where(scale_T.isfinite(), scale_T, torch.nan)
    inverse_T = torch.where(scale_T > TINY, 1 / scale_T, 0)
    return (x_TD * inverse_T[:, None]).nan_to_num(0).round().to(torch.int8), scale_T


FastLinear = PackedLinear | NativeLinear | WidenedLinear | Int8Linear


def pack(weight_OD: Tensor, bias_O: Tensor | None, products: Products, isa: int = -1) -> FastLinear:
    """A bfloat16 matrix on a CPU, in memory of its own."""
    if products == "native":
        return NativeLinear(native.pack(weight_OD), weight_OD.shape[0], bias_O, isa)
    if products == "onednn":
        return PackedLinear(torch.ops.mkldnn._reorder_linear_weight(weight_OD.contiguous(), None), bias_O)
    assert products == "widened", "what torch computes as it is, is not packed"
    return WidenedLinear(weight_OD.clone(), bias_O)


def pack_expert(weight_OD: Tensor, compute: Compute) -> FastLinear:
    """As pack, in the type chosen for experts."""
    return Int8Linear.of(weight_OD) if compute.int8_experts else pack(weight_OD, None, compute.experts, compute.isa)
