"""Tensors between the host and an actor's device: several in one copy, through pinned memory.

The data path of an actor waits for its device in download(), and nowhere else but for what few requests ask for:
penalties, log-probabilities and routed experts are copied one by one. On a CPU nothing is copied.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 16
# Copies in flight; what a download returns holds until so many others have been made.
SLOTS = 8


class Staging(ABC):
    """Belongs to one thread."""

    @abstractmethod
    def upload(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The same tensors on the device. Does not wait."""

    @abstractmethod
    def download(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The same tensors on the host: waits until the device has computed them. See SLOTS."""


def staging_for(device: torch.device) -> Staging:
    return DIRECT if device.type == "cpu" else Pinned(device)


class Direct(Staging):
    """The device is the host."""

    def upload(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors

    def download(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors


DIRECT = Direct()


class Pinned(Staging):
    """Not yet run on a GPU. On a CPU, as tests use it, memory is not pinned and nothing is to be waited for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._uploads = [_Slot(device) for _ in range(SLOTS)]
        self._downloads = [_Slot(device) for _ in range(SLOTS)]

    def upload(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        slot, places = _next(self._uploads), _places(tensors)
        host = slot.memory(places[-1])
        for tensor, view in zip(tensors, _views(host, tensors, places), strict=True):
            view.copy_(tensor)
        there = torch.empty(places[-1], dtype=torch.uint8, device=self.device)
        there.copy_(host, non_blocking=True)
        slot.record()
        return _views(there, tensors, places)

    def download(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        slot, places = _next(self._downloads), _places(tensors)
        there = torch.empty(places[-1], dtype=torch.uint8, device=self.device)
        for tensor, view in zip(tensors, _views(there, tensors, places), strict=True):
            view.copy_(tensor)
        host = slot.memory(places[-1])
        host.copy_(there, non_blocking=True)
        slot.record()
        slot.wait()
        return _views(host, tensors, places)


class _Slot:
    """Pinned memory that grows, and an event behind the last copy from or to it."""

    def __init__(self, device: torch.device) -> None:
        self._is_on_gpu = device.type == "cuda"
        self._event = torch.cuda.Event() if self._is_on_gpu else None
        self._memory = torch.empty(0, dtype=torch.uint8)

    def memory(self, num_bytes: int) -> Tensor:
        """Once the last copy is over."""
        self.wait()
        if len(self._memory) < num_bytes:
            self._memory = torch.empty(2 * num_bytes, dtype=torch.uint8, pin_memory=self._is_on_gpu)
        return self._memory[:num_bytes]

    def record(self) -> None:
        if self._event:
            self._event.record()

    def wait(self) -> None:
        if self._event:
            self._event.synchronize()


def _next(slots: list[_Slot]) -> _Slot:
    slots.append(slots.pop(0))
    return slots[-1]


def _places(tensors: Sequence[Tensor]) -> list[int]:
    """Where each tensor begins, and where the last one ends."""
    places = [0]
    for tensor in tensors:
        places.append(places[-1] + -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT)
    return places


def _views(memory: Tensor, tensors: Sequence[Tensor], places: list[int]) -> tuple[Tensor, ...]:
    """Pieces of memory in the types and shapes of the tensors."""
    return tuple(
        memory[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for tensor, begin in zip(tensors, places, strict=False)
    )
