"""A replica's end of the unix lane in one native loop (serving.cpp): what is ordinary is read, computed and answered
without Python. Experts of FusedExperts' kind, bfloat16 activations.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.kernels import abi
from actors.kernels.native import NativeExperts, loaded


@dataclass(frozen=True, slots=True)
class Computed:
    """Since the start. `at_most[i]`: messages that took the i-th bound at most, but longer than the one before."""

    tokens: int
    messages: int
    dropped: int
    seconds: float
    at_most: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a model's experts: layers, experts of a layer, hidden size, top-k."""

    num_layers: int
    num_experts: int
    hidden: int
    top_k: int


class NativeServing:
    """`bounds` of the histogram of computations, in seconds."""

    def __init__(self, shape: Shape, kind: NativeExperts, bounds: Sequence[float]) -> None:
        assert len(bounds) < abi.MAX_BOUNDS
        self.shape = shape
        self._num_bounds = len(bounds)
        self._handle = ctypes.c_void_p(
            loaded().outcrop_serving_new(
                kind.is_int8, kind.isa, shape.num_layers, shape.num_experts, shape.hidden, kind.width, shape.top_k,
                (ctypes.c_double * len(bounds))(*bounds), len(bounds),
            )
        )  # fmt: skip
        self._counts = abi.ServingCounts.from_address(loaded().outcrop_serving_counts(self._handle))
        self._layers: dict[int, tuple[NativeExperts, Tensor]] = {}
        self._arrival = abi.Arrival()

    def set_layer(self, layer: int, ids: Sequence[int], experts: NativeExperts) -> None:
        """Compute a layer by these experts from now on. Waits for the computation that is running."""
        rows = torch.full((self.shape.num_experts,), -1)
        rows[list(ids)] = torch.arange(len(ids))
        loaded().outcrop_serving_set_layer(
            self._handle, layer, experts.packed_EX.data_ptr(), len(experts.packed_EX), rows.data_ptr()
        )
        self._layers[layer] = experts, rows  # the memory of those before is given back now

    def listen(self, listener: int) -> None:
        loaded().outcrop_serving_listen(self._handle, listener)

    def add(self, peer: int) -> None:
        """A front has been let in; the socket is closed by the loop."""
        loaded().outcrop_serving_add(self._handle, peer)

    def run(self, timeout_s: float) -> tuple[int, tuple[int, int, bytes] | None]:
        """Serve until something is out of the ordinary or nobody wants anything for a while: the event (abi.NOTHING,
        KNOCKED, CAME), and a message with its peer and its number.
        """
        event = loaded().outcrop_serving_run(
            self._handle, torch.get_num_threads(), int(1000 * timeout_s), ctypes.byref(self._arrival)
        )
        if event != abi.CAME:
            return event, None
        came = self._arrival
        return event, (came.peer, came.number, ctypes.string_at(came.message, came.length))

    def answer(self, peer: int, number: int, body: bytes) -> None:
        loaded().outcrop_serving_answer(self._handle, peer, number, body, len(body))

    @property
    def num_peers(self) -> int:
        return int(loaded().outcrop_serving_num_peers(self._handle))

    @property
    def began_at(self) -> float | None:
        """On the monotonic clock; None while nothing is computed. For any thread."""
        began = self._counts.began_at
        return began / 1e9 if began else None

    def computed(self) -> Computed:
        """For any thread."""
        counts = self._counts
        at_most = tuple(counts.at_most[: self._num_bounds + 1])
        return Computed(counts.tokens, counts.messages, counts.dropped, counts.nanoseconds / 1e9, at_most)

    def stop(self) -> None:
        """End run(), for good."""
        loaded().outcrop_serving_stop(self._handle)

    def close_peers(self) -> None:
        """Once run() has ended."""
        loaded().outcrop_serving_close(self._handle)
