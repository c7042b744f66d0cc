"""From a checkpoint to tensors in place: reads only the slices an actor needs, straight into their final memory.

A file is mapped while one layer is copied out of it and unmapped after, so the pages that were read do not add up to a
second copy of the weights. Progress is told in bytes as stored, so that all actors' sums can be compared with
Checkpoint's.
"""

from collections.abc import Callable

import torch
from safetensors import safe_open
from torch import Tensor

from actors.compute import Compute
from cluster.models.checkpoint import Checkpoint

Progress = Callable[[int], None]
# Rows copied at a time, in bytes: progress moves, and mapped pages stay few even in a large embedding.
COPY_BYTES = 64 << 20


class Weights:
    """Tensors of a checkpoint, by our keys, copied into memory of the device and type that an actor computes with."""

    def __init__(self, checkpoint: Checkpoint, compute: Compute, progress: Progress = lambda _: None) -> None:
        self.checkpoint = checkpoint
        self.spec = checkpoint.spec
        self.compute = compute
        self.progress = progress

    def read(self, key: str) -> Tensor:
        out = self.empty(*self.checkpoint.tensors[key].shape)
        self.read_into(out, key)
        return out

    def read_stacked(self, *keys: str) -> Tensor:
        """Tensors one below the other, as one."""
        shapes = [self.checkpoint.tensors[key].shape for key in keys]
        out = self.empty(sum(shape[0] for shape in shapes), *shapes[0][1:])
        start = 0
        for key, shape in zip(keys, shapes, strict=True):
            self.read_into(out[start : start + shape[0]], key)
            start += shape[0]
        return out

    def read_into(self, out: Tensor, key: str, first: int = 0) -> None:
        """Rows [first, first + len(out)) of a tensor."""
        info = self.checkpoint.tensors[key]
        row_bytes = info.num_bytes // info.shape[0]
        step = max(1, COPY_BYTES // row_bytes)
        for start in range(0, out.shape[0], step):
            part = out[start : start + step]
            with safe_open(info.file, framework="pt") as file:
                part.copy_(file.get_slice(info.name)[first + start : first + start + part.shape[0]])
            self.progress(part.shape[0] * row_bytes)

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, device=self.compute.device, dtype=self.compute.dtype)
