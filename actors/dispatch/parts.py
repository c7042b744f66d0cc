"""Parts: what one group gets of one layer's tokens. Split from the routing, checked when they come back.

Shapes: T tokens, D hidden, K top-k, E experts; P tokens of a part.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.lanes import wire
from cluster.expert_map import ReplicaAddress


class CorruptAnswerError(RuntimeError):
    """A replica's answer can't be used."""


class NotHeldError(RuntimeError):
    """A replica does not hold an expert: the map that the dispatch was made by has moved on."""


@dataclass(frozen=True, slots=True)
class Sent:
    """A message on its way to a replica."""

    replica: ReplicaAddress
    ticket: Any
    at: float


@dataclass(slots=True)
class Part:
    """`rows_P` are the part's tokens among the step's, None for all of them. ids is -1 where a choice is elsewhere.

    `sent` has more than one entry when the first replica was late and the part was sent again to another.
    """

    layer: int
    group: int
    rows_P: Tensor | None
    x_PD: Tensor
    gates_PK: Tensor
    ids_PK: Tensor
    map_version: int
    sent: list[Sent] = field(default_factory=list)
    tried: set[str] = field(default_factory=set)

    @property
    def num_tokens(self) -> int:
        return len(self.x_PD)


class HomeTable:
    """A layer's experts -> groups, for whole arrays of tokens at a time.

    Tokens of an expert with several homes are spread over them by a function of the token's own routing, so that what
    is computed for a token never depends on the tokens it is batched with.
    """

    def __init__(self, homes: Sequence[Sequence[int]]) -> None:
        self.num_groups = 1 + max(group for groups in homes for group in groups)
        self._num_homes_E = np.array([len(groups) for groups in homes], np.int16)
        most = int(self._num_homes_E.max())
        self._home_ER = np.array([[groups[r % len(groups)] for r in range(most)] for groups in homes], np.int16)
        self._is_redundant = most > 1

    @property
    def arrays(self) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
        """home_ER and the number of homes of each expert, for the native exchange."""
        return self._home_ER, self._num_homes_E

    def of(self, ids_TK: NDArray[np.int16]) -> NDArray[np.int16]:
        """The group of each choice; meaningless where an id is negative."""
        which: Any = 0
        if self._is_redundant:
            key_T1 = ids_TK.sum(axis=1, keepdims=True, dtype=np.int32)
            which = key_T1 % self._num_homes_E[ids_TK]
        return self._home_ER[ids_TK, which]  # type: ignore[no-any-return]


def split(
    layer: int, x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor, homes: "HomeTable", map_version: int
) -> list[Part]:
    """One part for each group that got a token, in the order of groups. All tensors are on the host."""
    # numpy: on arrays this small a torch call costs several times as much.
    ids = ids_TK.numpy().astype(np.int16, copy=False)
    home_TK = np.where(ids < 0, -1, homes.of(ids))
    parts = []
    for group in range(homes.num_groups):
        here_TK = home_TK == group
        here_T = here_TK.any(axis=1)
        num_here = np.count_nonzero(here_T)
        if num_here == 0:
            continue
        here_ids = torch.from_numpy(np.where(here_TK, ids, np.int16(-1)))
        if num_here == len(here_T):
            parts.append(Part(layer, group, None, x_TD, gates_TK, here_ids, map_version))
        else:
            rows = torch.from_numpy(here_T.nonzero()[0])
            parts.append(Part(layer, group, rows, x_TD[rows], gates_TK[rows], here_ids[rows], map_version))
    return parts


def checked(frame: wire.Buffer, part: Part) -> tuple[Tensor, float]:
    """The partial sums of an answer, a view of the frame, and the seconds that the experts computed.

    Raises NotHeldError or CorruptAnswerError.
    """
    try:
        answer = wire.unpack_partial(frame)
    except wire.WireError as error:
        raise CorruptAnswerError(str(error)) from None
    if answer.status == wire.NOT_HELD:
        raise NotHeldError(answer.text)
    partial_PD = answer.partial_TD
    if partial_PD is None:
        raise CorruptAnswerError(answer.text)
    if partial_PD.shape != part.x_PD.shape or partial_PD.dtype != part.x_PD.dtype:
        raise CorruptAnswerError(f"partial sums of shape {tuple(partial_PD.shape)}, {partial_PD.dtype}")
    if not math.isfinite(float(partial_PD.sum(dtype=torch.float32))):
        raise CorruptAnswerError("partial sums are not finite")
    return partial_PD, answer.compute_seconds
