"""The native kernels (*.cpp) through ctypes: packed matrices, and products with them. The GIL is released.

The library is built with the package where there is a C++ compiler and an x86-64 CPU (hatch_build.py); what this CPU
can run is found out here, at run time. Threads: as many as torch may use in this process.

Shapes: T tokens, D input width, O output width, F expert hidden, E experts, K top-k.
"""

import ctypes
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from actors.kernels import abi

HUGE_PAGE = 2 << 20
LIBRARY = Path(__file__).with_name("libkernels.so")

# What `outcrop check` says of an instruction set beside its name.
TESTED = {
    "avx2": "tested on hardware",
    "avx512_bf16": "tested on hardware",
    "amx_bf16": "only emulated: never run on a CPU that has it",
}


@cache
def _open() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    if not LIBRARY.exists():
        return "the native kernels have not been built (was a C++ compiler there when Outcrop was installed?)"
    try:
        found = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return f"the native kernels can't be loaded ({error})"
    if differing := abi.difference(found):
        return f"the native kernels were built from other sources ({differing}): install Outcrop again"
    abi.declare(found)
    return found


def library() -> ctypes.CDLL | None:
    """None where it has not been built, can't be loaded, or is not of these sources."""
    found = _open()
    return None if isinstance(found, str) else found


def why_not_loaded() -> str:
    """Which of these it is; empty where there is a library."""
    found = _open()
    return found if isinstance(found, str) else ""


def loaded() -> ctypes.CDLL:
    """For those who come only where instruction_sets() has any."""
    lib = library()
    assert lib is not None
    return lib


@cache
def instruction_sets() -> dict[str, int]:
    """Those that this CPU can run, the slowest first: name -> number."""
    lib, names = library(), {}
    number = 0
    while lib and (name := lib.outcrop_isa_name(number)):
        if lib.outcrop_isa_works(number):
            names[name.decode()] = number
        number += 1
    return names


def fastest() -> int:
    return list(instruction_sets().values())[-1]


def memory(*shape: int) -> Tensor:
    """Bytes for packed matrices, in huge pages where the system has them."""
    num_bytes = math.prod(shape)
    space = torch.empty(num_bytes + HUGE_PAGE, dtype=torch.uint8)
    first = -space.data_ptr() % HUGE_PAGE
    aligned = space[first : first + num_bytes]
    loaded().outcrop_use_huge_pages(aligned.data_ptr(), num_bytes)
    return aligned.view(shape)


def packed_bytes(num_outputs: int, num_inputs: int, is_int8: bool = False) -> int:
    return int(loaded().outcrop_packed_bytes(is_int8, num_outputs, num_inputs))


def pack(weight_OD: Tensor, out: Tensor | None = None, is_int8: bool = False) -> Tensor:
    """The matrix in tiles, as bytes; opaque, the same for every instruction set. int8: rounded, a scale per output."""
    assert weight_OD.dtype == torch.bfloat16
    weight_OD = weight_OD.contiguous()
    if out is None:
        out = memory(packed_bytes(weight_OD.shape[0], weight_OD.shape[1], is_int8))
    loaded().outcrop_pack(is_int8, weight_OD.data_ptr(), *weight_OD.shape, out.data_ptr())
    return out


@dataclass(frozen=True, slots=True)
class NativeLinear:
    """Called as Linear is. Sums are float32, and rounded once."""

    packed: Tensor
    num_outputs: int
    bias_O: Tensor | None
    isa: int

    def __call__(self, x_TD: Tensor) -> Tensor:
        lib = loaded()
        x_TD = x_TD.contiguous()
        y_TO = x_TD.new_empty(x_TD.shape[0], self.num_outputs)
        bias = None if self.bias_O is None else self.bias_O.data_ptr()
        lib.outcrop_linear(
            self.isa, torch.get_num_threads(), x_TD.data_ptr(), *x_TD.shape, self.packed.data_ptr(), self.num_outputs,
            bias, y_TO.data_ptr(),
        )  # fmt: skip
        return y_TO


@dataclass(frozen=True, slots=True)
class NativeExperts:
    """Experts of a layer with silu. Each row is one: gate, up and down, packed one behind the other."""

    packed_EX: Tensor
    width: int  # F
    isa: int
    is_int8: bool = False

    @classmethod
    def of(cls, gate_up_EFD: Tensor, down_EDF: Tensor, isa: int, is_int8: bool = False) -> "NativeExperts":
        num_experts, hidden, width = down_EDF.shape
        up_at = packed_bytes(width, hidden, is_int8)
        packed_EX = memory(num_experts, 2 * up_at + packed_bytes(hidden, width, is_int8))

        def pack_one(packed_X: Tensor, gate_up_FD: Tensor, down_DF: Tensor) -> None:
            pack(gate_up_FD[:width], packed_X, is_int8)
            pack(gate_up_FD[width:], packed_X[up_at:], is_int8)
            pack(down_DF, packed_X[2 * up_at :], is_int8)

        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            list(threads.map(pack_one, packed_EX, gate_up_EFD, down_EDF))
        return cls(packed_EX, width, isa, is_int8)

    def select(self, rows: Sequence[int], more: "NativeExperts") -> "NativeExperts":
        """Copies of experts by their rows, in this order; those of `more` are counted on."""
        packed_EX = memory(len(rows), self.packed_EX.shape[1])
        both = (*self.packed_EX, *more.packed_EX)
        for packed_X, row in zip(packed_EX, rows, strict=True):
            packed_X.copy_(both[row])
        return replace(self, packed_EX=packed_EX)

    def run(self, x_TD: Tensor, rows_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """Sum of gate * expert(x) over each token's choices, [T, D]; rows_TK int64, E and more: computed elsewhere.

        Sums are float32 in the order of the choices.
        """
        lib = loaded()
        x_TD, rows_TK, gates_TK = x_TD.contiguous(), rows_TK.contiguous(), gates_TK.contiguous()
        out_TD = torch.empty_like(x_TD)
        lib.outcrop_experts(
            self.is_int8, self.isa, torch.get_num_threads(), x_TD.data_ptr(), *x_TD.shape, self.width,
            rows_TK.data_ptr(), gates_TK.data_ptr(), rows_TK.shape[1], len(self.packed_EX), self.packed_EX.data_ptr(),
            out_TD.data_ptr(),
        )  # fmt: skip
        return out_TD
