"""Dispatch and combine over stream sockets in one native call (exchange.cpp), and steps of several layers (steps.cpp).

What is out of the ordinary comes back as it is, in records: whoever calls goes on from there.

Shapes: T tokens, D hidden, K top-k, G groups, R replicas, L layers, E experts.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.kernels import abi, heads
from actors.kernels.front_layer import NativeBatch, NativeFrontLayer
from actors.kernels.native import loaded

# Messages of the native exchange have numbers that the lane itself does not give.
FIRST_NUMBER = 1 << 62
DONE, HALF_DONE, NOT_BEGUN = range(3)  # what an exchange returns
CODES = {getattr(torch, name): code for code, name in enumerate(heads.DTYPES[:2])}
_FIELDS = tuple(name for name, *_ in abi.Part._fields_)

# A record of each part: abi.Part as a row of numbers, the columns named by COLUMN.
Records = NDArray[np.int64]
COLUMN = {name: place for place, name in enumerate(_FIELDS)}


@dataclass(frozen=True, slots=True)
class Table:
    """Where the experts of all layers are. home_ER int16 and number_E int16 of each layer: see HomeTable."""

    homes: ctypes.Array[ctypes.Structure]
    kept: tuple[NDArray[np.int16], ...]

    @classmethod
    def of(cls, layers: Sequence[tuple[NDArray[np.int16], NDArray[np.int16]]]) -> "Table":
        homes = (abi.Homes * len(layers))()
        for entry, (home_ER, number_E) in zip(homes, layers, strict=True):
            assert home_ER.flags.c_contiguous
            entry.E, entry.most = home_ER.shape
            entry.home, entry.numbers = home_ER.ctypes.data, number_E.ctypes.data
        return cls(homes, tuple(array for layer in layers for array in layer))


class NativeExchange:
    """`replicas[g]`: (socket, messages sent so far) of each replica that group g's messages may go to."""

    def __init__(self, replicas: Sequence[Sequence[tuple[int, int]]], table: Table, next_number: int) -> None:
        self.table = table
        self._num_groups = len(replicas)
        flat = [replica for group in replicas for replica in group]
        self._first_G1 = np.cumsum([0, *map(len, replicas)], dtype=np.int64)
        self._replicas = (abi.Replica * len(flat))(*(abi.Replica(*replica) for replica in flat))
        self._patience_GB = np.zeros((len(replicas), abi.PATIENCE), np.int64)
        self._fields = abi.Exchange(
            G=len(replicas), first=self._first_G1.ctypes.data, replicas=ctypes.addressof(self._replicas),
            patience=self._patience_GB.ctypes.data, next_number=next_number,
        )  # fmt: skip

    @property
    def next_number(self) -> int:
        return int(self._fields.next_number)

    def begin(self, front: int, step: int, dtype: torch.dtype, patience_GB: NDArray[np.float64]) -> None:
        """A step begins. patience_GB: seconds to wait for an answer to so many tokens as have B bits."""
        fields = self._fields
        fields.front, fields.step, fields.dtype = front, step, CODES[dtype]
        self._patience_GB[:, : patience_GB.shape[1]] = 1e9 * patience_GB
        self._patience_GB[:, patience_GB.shape[1] :] = self._patience_GB[
            :, patience_GB.shape[1] - 1 : patience_GB.shape[1]
        ]

    def run(self, layer: int, x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor) -> tuple[int, Tensor, Records]:
        """DONE, HALF_DONE or NOT_BEGUN; the sum over all groups, [T, D] as x; records [G]. ids: int64."""
        x_TD, ids_TK, gates_TK = x_TD.contiguous(), ids_TK.contiguous(), gates_TK.contiguous()
        out_TD, records = torch.empty_like(x_TD), np.zeros((self._num_groups, len(_FIELDS)), np.int64)
        outcome = loaded().outcrop_exchange(
            ctypes.byref(self._fields), ctypes.byref(self.table.homes[layer]), layer, *x_TD.shape, ids_TK.shape[1],
            x_TD.data_ptr(), ids_TK.data_ptr(), gates_TK.data_ptr(), out_TD.data_ptr(), records.ctypes.data,
        )  # fmt: skip
        return outcome, out_TD, records

    def walk(self, steps: "NativeSteps", first: int) -> tuple[int, int, Records, NDArray[np.int64]]:
        """Take a step through the layers from `first` on: the layer whose exchange is not done, or the number of
        layers; what that returned; records [L, G] and nanoseconds [L] of the exchanges.
        """
        num_layers = len(self.table.homes)
        records = np.zeros((num_layers, self._num_groups, len(_FIELDS)), np.int64)
        seconds, outcome = np.zeros(num_layers, np.int64), ctypes.c_int(DONE)
        fields = steps.fields
        fields.exchange, fields.homes = ctypes.addressof(self._fields), ctypes.addressof(self.table.homes)
        fields.parts, fields.seconds = records.ctypes.data, seconds.ctypes.data
        reached = loaded().outcrop_steps(ctypes.byref(fields), first, ctypes.byref(outcome))
        return reached, outcome.value, records, seconds


class NativeSteps:
    """One step's front halves of all layers, for outcrop_steps. k and v: [L, ...], the caches of all layers."""

    def __init__(
        self,
        layers: Sequence[NativeFrontLayer],
        batches_L: Sequence[NativeBatch],
        k_LX: Tensor,
        v_LX: Tensor,
        x_TD: Tensor,
        ids_LTK: Tensor,
    ) -> None:
        self.h_TD, self.combined_TD = torch.empty_like(x_TD), torch.empty_like(x_TD)
        self.gates_TK = x_TD.new_empty(ids_LTK.shape[1:])
        self._kept = layers, batches_L, k_LX, v_LX, x_TD, ids_LTK
        self._batches = (ctypes.c_void_p * len(layers))(*(ctypes.addressof(batch.fields) for batch in batches_L))
        self._layers = (ctypes.c_void_p * len(layers))(*(ctypes.addressof(layer.fields) for layer in layers))
        self.fields = abi.Steps(
            isa=layers[0].linears[0].isa, threads=torch.get_num_threads(), L=len(layers),
            layers=ctypes.addressof(self._layers), batches=ctypes.addressof(self._batches),
            k=k_LX.data_ptr(), v=v_LX.data_ptr(), cache=k_LX.stride(0),
            x=x_TD.data_ptr(), h=self.h_TD.data_ptr(), combined=self.combined_TD.data_ptr(),
            ids=ids_LTK.data_ptr(), gates=self.gates_TK.data_ptr(),
        )  # fmt: skip


def received_of(answer: int, received: int) -> bytes:
    """What has come of the answer's frame to a part, by its record. It is there until the thread's next exchange."""
    return ctypes.string_at(answer, received) if received else b""
