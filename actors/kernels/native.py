"""The native kernels (*.cpp) through ctypes: packed matrices, products with them, attention. The GIL is released.

The library is built with the package where there is a C++ compiler and an x86-64 CPU (hatch_build.py); what this CPU
can run is found out here, at run time. Threads: as many as torch may use in this process.

Shapes: T tokens, D input width, O output width, F expert hidden, E experts, K top-k; S sequences, B blocks, P slots of
a block, H query heads, G key/value heads, C head dimension.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

LIBRARY = Path(__file__).with_name("libkernels.so")

_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float


@cache
def library() -> ctypes.CDLL | None:
    """None where it has not been built, or can't be loaded."""
    try:
        found = ctypes.CDLL(str(LIBRARY))
    except OSError:
        return None
    found.outcrop_isa_name.argtypes, found.outcrop_isa_name.restype = [_INT], ctypes.c_char_p
    found.outcrop_isa_works.argtypes, found.outcrop_isa_works.restype = [_INT], _INT
    found.outcrop_packed_bytes.argtypes, found.outcrop_packed_bytes.restype = [_LONG, _LONG], _LONG
    found.outcrop_pack.argtypes = [_POINTER, _LONG, _LONG, _POINTER]
    found.outcrop_linear.argtypes = [
        _INT, _LONG, _POINTER, _LONG, _LONG, _POINTER, _LONG, _POINTER, _POINTER,
    ]  # fmt: skip
    found.outcrop_experts.argtypes = [
        _INT, _LONG, _POINTER, _LONG, _LONG, _LONG, _POINTER, _POINTER, _LONG, _LONG, _POINTER, _POINTER, _POINTER,
    ]  # fmt: skip
    found.outcrop_attention.argtypes = [
        _LONG, _POINTER, _LONG, _POINTER, _LONG, _POINTER, _LONG, _LONG, _POINTER, _POINTER, _LONG, _LONG, _LONG,
        _FLOAT, _POINTER,
    ]  # fmt: skip
    found.outcrop_read.argtypes, found.outcrop_read.restype = [_LONG, _POINTER, _LONG], ctypes.c_uint64
    return found


def _loaded() -> ctypes.CDLL:
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


def pack(weight_OD: Tensor) -> Tensor:
    """The matrix in tiles, as int16 [padded O * padded D]; opaque, the same for every instruction set."""
    lib = _loaded()
    assert weight_OD.dtype == torch.bfloat16
    weight_OD = weight_OD.contiguous()
    packed = torch.empty(lib.outcrop_packed_bytes(*weight_OD.shape) // 2, dtype=torch.int16)
    lib.outcrop_pack(weight_OD.data_ptr(), *weight_OD.shape, packed.data_ptr())
    return packed


@dataclass(frozen=True, slots=True)
class NativeLinear:
    """Called as Linear is. Sums are float32, and rounded once."""

    packed: Tensor
    num_outputs: int
    bias_O: Tensor | None
    isa: int

    def __call__(self, x_TD: Tensor) -> Tensor:
        lib = _loaded()
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
    """Experts of a layer with silu, each a pair of packed matrices. Gate and up are packed one behind the other."""

    gate_up_E: tuple[Tensor, ...]
    down_E: tuple[Tensor, ...]
    width: int  # F
    isa: int

    @classmethod
    def of(cls, gate_up_EFD: Tensor, down_EDF: Tensor, isa: int) -> "NativeExperts":
        gate_up = tuple(torch.cat([pack(half_FD) for half_FD in each.chunk(2)]) for each in gate_up_EFD)
        return cls(gate_up, tuple(map(pack, down_EDF)), down_EDF.shape[2], isa)

    def __add__(self, more: "NativeExperts") -> "NativeExperts":
        return NativeExperts(self.gate_up_E + more.gate_up_E, self.down_E + more.down_E, self.width, self.isa)

    def select(self, rows: Sequence[int]) -> "NativeExperts":
        """Experts by their rows, in this order. Nothing is copied."""
        gate_up, down = (tuple(each[row] for row in rows) for each in (self.gate_up_E, self.down_E))
        return NativeExperts(gate_up, down, self.width, self.isa)

    def run(self, x_TD: Tensor, rows_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """Sum of gate * expert(x) over each token's choices, [T, D]; rows_TK int64, E and more: computed elsewhere.

        Sums are float32 in the order of the choices.
        """
        lib = _loaded()
        x_TD, rows_TK, gates_TK = x_TD.contiguous(), rows_TK.contiguous(), gates_TK.contiguous()
        out_TD = torch.empty_like(x_TD)
        gate_up, down = (_pointers(tensors) for tensors in (self.gate_up_E, self.down_E))
        lib.outcrop_experts(
            self.isa, torch.get_num_threads(), x_TD.data_ptr(), *x_TD.shape, self.width, rows_TK.data_ptr(),
            gates_TK.data_ptr(), rows_TK.shape[1], len(self.down_E), gate_up, down, out_TD.data_ptr(),
        )  # fmt: skip
        return out_TD


def _pointers(tensors: tuple[Tensor, ...]) -> "ctypes.Array[ctypes.c_void_p]":
    return (_POINTER * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def attend_singles(
    q_SHC: Tensor, k_BPGC: Tensor, v_BPGC: Tensor, blocks_SB: Tensor, contexts_S: Tensor, scale: float, out_SHC: Tensor
) -> None:
    """softmax(scale * q.k) v over each sequence's first `contexts_S` (int64, at least 1) tokens, into out_SHC.

    bfloat16; C is a multiple of 8; blocks_SB int32. Nothing is copied: all but q must be contiguous.
    """
    lib = _loaded()
    assert all(t.is_contiguous() for t in (k_BPGC, v_BPGC, blocks_SB, contexts_S, out_SHC))
    if q_SHC.stride()[1:] != (q_SHC.shape[2], 1):
        q_SHC = q_SHC.contiguous()
    lib.outcrop_attention(
        torch.get_num_threads(), q_SHC.data_ptr(), q_SHC.stride(0), contexts_S.data_ptr(), len(contexts_S),
        blocks_SB.data_ptr(), blocks_SB.shape[1], k_BPGC.shape[1], k_BPGC.data_ptr(), v_BPGC.data_ptr(),
        q_SHC.shape[1], k_BPGC.shape[2], q_SHC.shape[2], scale, out_SHC.data_ptr(),
    )  # fmt: skip
