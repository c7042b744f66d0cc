"""From a checkpoint to tensors in place: reads only the slices an actor needs, straight into their final memory.

Files are read, not mapped: what has been read is in the page cache for the next actor, and nowhere else. Pieces are
read by several threads, in the order of the file. Progress is told in bytes as stored, so that all actors' sums can be
compared with Checkpoint's.
"""

import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from actors.compute import Compute
from cluster.errors import ModelError
from cluster.models.checkpoint import Checkpoint
from cluster.models.tensor_files import TensorInfo

Progress = Callable[[int], None]
# Bytes read at a time: progress moves, and what is read into another type or for a GPU takes little memory twice.
PIECE_BYTES = 16 << 20
STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

# Rows [first, first + len(out)) of the tensor with this key go to `out`.
Part = tuple[Tensor, str, int]


class Weights:
    """Tensors of a checkpoint, by our keys, copied into memory of the device and type that an actor computes with."""

    def __init__(self, checkpoint: Checkpoint, compute: Compute, progress: Progress = lambda _: None) -> None:
        self.checkpoint = checkpoint
        self.spec = checkpoint.spec
        self.compute = compute
        self.progress = progress

    def read(self, key: str) -> Tensor:
        out = self.empty(*self.checkpoint.tensors[key].shape)
        self.read_parts([(out, key, 0)])
        return out

    def read_stacked(self, *keys: str) -> Tensor:
        """Tensors one below the other, as one."""
        shapes = [self.checkpoint.tensors[key].shape for key in keys]
        out = self.empty(sum(shape[0] for shape in shapes), *shapes[0][1:])
        outs = out.split([shape[0] for shape in shapes])
        self.read_parts([(part, key, 0) for part, key in zip(outs, keys, strict=True)])
        return out

    def read_parts(self, parts: list[Part]) -> None:
        """Raises ModelError for a file that can't be read or has become shorter."""
        pieces = [piece for part in parts for piece in self._pieces(part)]
        if len(pieces) == 1:
            self.progress(_read(*pieces[0]))
            return
        with ThreadPoolExecutor(max(1, min(torch.get_num_threads(), len(pieces)))) as threads:
            for num_bytes in threads.map(lambda piece: _read(*piece), pieces):
                self.progress(num_bytes)

    def _pieces(self, part: Part) -> Iterator[tuple[Tensor, TensorInfo, int]]:
        out, key, first = part
        info = self.checkpoint.tensors[key]
        row_bytes = info.num_bytes // info.shape[0]
        step = max(1, PIECE_BYTES // row_bytes)
        for start in range(0, out.shape[0], step):
            yield out[start : start + step], info, (first + start) * row_bytes

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, device=self.compute.device, dtype=self.compute.dtype)


def _read(out: Tensor, info: TensorInfo, offset: int) -> int:
    """Bytes of a tensor from `offset` on, into `out`; returns how many."""
    stored = STORED[info.dtype]
    is_in_place = out.device.type == "cpu" and out.dtype == stored and out.is_contiguous()
    raw = out if is_in_place else torch.empty(out.shape, dtype=stored)
    buffer = memoryview(raw.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    try:
        file = os.open(info.file, os.O_RDONLY)
        try:
            done = 0
            while done < len(buffer):
                read = os.preadv(file, [buffer[done:]], info.begin + offset + done)
                if not read:
                    raise ModelError(f"{info.file} is cut off within {info.name}: download it again")
                done += read
        finally:
            os.close(file)
    except OSError as error:
        raise ModelError(f"{info.file} can't be read: {error}") from None
    if not is_in_place:
        with torch.inference_mode():  # a mode that a thread has to itself, and the tensor may be of
            out.copy_(raw)
    return math.prod(raw.shape) * stored.itemsize
