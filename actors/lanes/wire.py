"""What a dispatch and its answer look like as bytes: a fixed header, then raw little-endian buffers. No pickle.

    dispatch  header | x [T, D] | gates [T, K] | expert ids [T, K] int16, -1: not for this group
    partial   header | partial sums [T, D], or, if the status is not OK, a UTF-8 text

Every length is checked before it is used. Tensors are views of the received buffer: read them, never write.
"""

import struct
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from actors.kernels import heads
from actors.kernels.heads import DISPATCH_MAGIC, FAILED, MAX_HIDDEN, MAX_TOKENS, MAX_TOP_K, NOT_HELD, OK, PARTIAL_MAGIC
from actors.lanes.step_id import NO_STEP, StepId

__all__ = ("FAILED", "MAX_HIDDEN", "MAX_TOKENS", "MAX_TOP_K", "NOT_HELD", "OK")

Buffer = bytes | bytearray | memoryview

_DISPATCH, _PARTIAL = heads.DISPATCH.layout, heads.PARTIAL.layout
_DTYPES: tuple[torch.dtype, ...] = tuple(getattr(torch, name) for name in heads.DTYPES)
CODES: dict[torch.dtype, int] = {dtype: code for code, dtype in enumerate(_DTYPES)}

warnings.filterwarnings("ignore", message="The given buffer is not writable")


class WireError(ValueError):
    """Bytes that are no message of ours."""


@dataclass(frozen=True, slots=True)
class Dispatch:
    step: StepId
    layer: int
    x_TD: Tensor
    gates_TK: Tensor
    ids_TK: Tensor


@dataclass(frozen=True, slots=True)
class Partial:
    """`partial_TD` if status is OK; else `expert` (NOT_HELD) and `text` say what is wrong."""

    status: int
    partial_TD: Tensor | None
    expert: int
    text: str
    compute_seconds: float


def pack_dispatch(layer: int, x_TD: Tensor, gates_TK: Tensor, ids_TK: Tensor, step: StepId = NO_STEP) -> bytes:
    """x and gates share a dtype of _DTYPES; ids are any integers that fit int16."""
    header = _DISPATCH.pack(DISPATCH_MAGIC, CODES[x_TD.dtype], *step, layer, ids_TK.shape[1], *x_TD.shape)
    return b"".join((header, _bytes(x_TD), _bytes(gates_TK), _bytes(ids_TK.to(torch.int16))))


def unpack_dispatch(frame: Buffer) -> Dispatch:
    """Raises WireError."""
    _, code, front, number, layer, top_k, num_tokens, hidden = _header(_DISPATCH, DISPATCH_MAGIC, frame)
    dtype = _dtype(code)
    _check_sizes(num_tokens, hidden, top_k)
    x_end = _DISPATCH.size + num_tokens * hidden * dtype.itemsize
    gates_end = x_end + num_tokens * top_k * dtype.itemsize
    _check_length(frame, gates_end + num_tokens * top_k * 2)
    # One look at x and gates together, then two views: these few calls are all that a small message costs.
    count = num_tokens * (hidden + top_k)
    flat = torch.frombuffer(frame, dtype=dtype, count=count, offset=_DISPATCH.size)
    x_TD = flat.as_strided((num_tokens, hidden), (hidden, 1))
    gates_TK = flat.as_strided((num_tokens, top_k), (top_k, 1), num_tokens * hidden)
    ids_TK = _tensor(frame, torch.int16, gates_end, num_tokens, top_k)
    return Dispatch(StepId(front, number), layer, x_TD, gates_TK, ids_TK)


def pack_partial(partial_TD: Tensor, compute_seconds: float) -> bytes:
    num_tokens, hidden = partial_TD.shape
    header = _PARTIAL.pack(
        PARTIAL_MAGIC, CODES[partial_TD.dtype], OK, num_tokens, hidden, 0, int(compute_seconds * 1e9)
    )
    return b"".join((header, _bytes(partial_TD)))


def pack_refusal(status: int, text: str, expert: int = -1) -> bytes:
    return _PARTIAL.pack(PARTIAL_MAGIC, 0, status, 0, 0, expert, 0) + text.encode()


def unpack_partial(frame: Buffer) -> Partial:
    """Raises WireError."""
    _, code, status, num_tokens, hidden, expert, nanoseconds = _header(_PARTIAL, PARTIAL_MAGIC, frame)
    if status != OK:
        return Partial(status, None, expert, bytes(frame[_PARTIAL.size :]).decode(errors="replace"), 0.0)
    _check_sizes(num_tokens, hidden, 1)
    dtype = _dtype(code)
    _check_length(frame, _PARTIAL.size + num_tokens * hidden * dtype.itemsize)
    partial_TD = _tensor(frame, dtype, _PARTIAL.size, num_tokens, hidden)
    return Partial(OK, partial_TD, -1, "", nanoseconds / 1e9)


def _header(layout: struct.Struct, magic: int, frame: Buffer) -> tuple[Any, ...]:
    if len(frame) < layout.size:
        raise WireError(f"{len(frame)} bytes are too few for a header of {layout.size}")
    fields = layout.unpack_from(frame)
    if fields[0] != magic:
        raise WireError(f"magic {fields[0]:#x} where {magic:#x} belongs")
    return fields


def _dtype(code: int) -> torch.dtype:
    if code >= len(_DTYPES):
        raise WireError(f"unknown dtype code {code}")
    return _DTYPES[code]


def _check_sizes(num_tokens: int, hidden: int, top_k: int) -> None:
    if not (0 < num_tokens <= MAX_TOKENS and 0 < hidden <= MAX_HIDDEN and 0 < top_k <= MAX_TOP_K):
        raise WireError(f"sizes out of range: tokens {num_tokens}, hidden {hidden}, top-k {top_k}")


def _check_length(frame: Buffer, expected: int) -> None:
    if len(frame) != expected:
        raise WireError(f"message of {len(frame)} bytes where its header says {expected}")


def _tensor(frame: Buffer, dtype: torch.dtype, offset: int, rows: int, columns: int) -> Tensor:
    return torch.frombuffer(frame, dtype=dtype, count=rows * columns, offset=offset).view(rows, columns)


def _bytes(tensor: Tensor) -> Any:
    """The tensor's bytes as an array, which join() reads where they are."""
    return tensor.cpu().contiguous().view(torch.uint8).numpy()
