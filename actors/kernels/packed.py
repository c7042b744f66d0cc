"""bfloat16 matrices on a CPU, in the form that the CPU computes fastest with. The plain matrix is the oracle of each
(tests/unit/test_packed.py).

With bfloat16 instructions, a matrix is packed once, at load, into the layout that oneDNN computes with: decode reads it
up to twice as fast. Without such instructions, it is packed for our own kernels (native.py). Packing keeps the size:
the plain matrix can be dropped. Where the kernels have not been built, torch computes bfloat16 products row by row of
x; from a few rows on it is faster to widen the matrix to float32 piece by piece.

Shapes: T tokens, D input width, O output width.
"""

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from actors.kernels import native
from actors.kernels.native import NativeLinear
from cluster.messages import KernelChoice

# With fewer rows than this, widening costs more than it saves, the more so with several threads that must be woken.
WIDEN_ROWS = 8
# Values of a widened piece: 1 MiB of float32 stays in the caches between being written and being read.
PIECE = 1 << 18


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


FastLinear = PackedLinear | NativeLinear | WidenedLinear


def can_pack(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16


@cache
def has_bfloat16() -> bool:
    """Whether this CPU and this build of torch multiply bfloat16 matrices natively."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Kernels:
    """What this process computes with; set once, before weights are loaded."""

    choice: KernelChoice = "auto"

    @classmethod
    def choose(cls, choice: KernelChoice) -> None:
        """Raises RuntimeError if they are asked for and can't be had."""
        if choice == "native" and not native.instruction_sets():
            raise RuntimeError(f"kernels='native': {why_not_native()}: choose auto or torch")
        cls.choice = choice


def use_native() -> bool:
    """Whether our own kernels are the best choice here: oneDNN comes first where the CPU has bfloat16 instructions."""
    if Kernels.choice == "torch" or not native.instruction_sets():
        return False
    return Kernels.choice == "native" or not has_bfloat16()


def why_not_native() -> str:
    if native.library() is None:
        return "the native kernels have not been built (was a C++ compiler there when Outcrop was installed?)"
    return "this CPU has none of the instruction sets of the native kernels (the least is AVX2)"


def describe() -> str:
    """Which kernels compute bfloat16 on this CPU, and why."""
    if use_native():
        names = list(native.instruction_sets())
        return f"native, {names[-1]}" + ("" if has_bfloat16() else ": oneDNN finds no bfloat16 instructions here")
    if has_bfloat16():
        return "oneDNN: this CPU has bfloat16 instructions"
    return "torch, slow: " + ("as chosen" if Kernels.choice == "torch" else why_not_native())


def pack(weight_OD: Tensor, bias_O: Tensor | None = None) -> FastLinear:
    """In memory of its own. For matrices that can_pack() accepts."""
    if use_native():
        return NativeLinear(native.pack(weight_OD), weight_OD.shape[0], bias_O, native.fastest())
    if has_bfloat16():
        return PackedLinear(torch.ops.mkldnn._reorder_linear_weight(weight_OD.contiguous(), None), bias_O)
    return WidenedLinear(weight_OD.clone(), bias_O)
