"""One layer's experts in memory, and the sum of those that a token has chosen: plain, packed matrix by matrix, or
packed for one native call. LayerExperts is the oracle of the other two.

Shapes: T tokens, D hidden, F expert hidden, K top-k, E experts held of a layer, P (token, choice) pairs.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from actors.activations import Activation
from actors.compute import Compute
from actors.kernels.native import NativeExperts
from actors.packed import FastLinear, pack_expert
from actors.staging import DIRECT, Staging


@dataclass(frozen=True, slots=True)
class Choices:
    """What the tokens of a message have chosen of a layer. rows_TK (int64) are rows of the weights; E and more:
    computed elsewhere. Rows may be on the host while x and gates are on a GPU: then all that depends on their values
    is done on the host.
    """

    rows_TK: Tensor
    gates_TK: Tensor
    staging: Staging = DIRECT


@dataclass(frozen=True, slots=True)
class LayerExperts:
    """One layer's experts. Row i of the weights is global expert `ids[i]`; gate rows come before up rows."""

    ids: tuple[int, ...]
    gate_up_EFD: Tensor
    down_EDF: Tensor

    def combine(self, x_TD: Tensor, choices: Choices, activation: Activation) -> Tensor:
        """Sum of gate * expert(x) over each token's choices, [T, D] in the type of x. Sums are float32."""
        return combine_sorted(self, x_TD, choices, activation)

    def run(self, x_PD: Tensor, ends_E: Tensor, activation: Activation) -> Tensor:
        """expert(x) for pairs sorted by expert, those of expert e before ends_E[e] (int32): [P, D]. Rows behind the
        last end are anything. The ends are where x is if `is_grouped`, else on the host.
        """
        run = run_experts_grouped if self.is_grouped else run_experts_loop
        return run(self, x_PD, ends_E, activation)

    @property
    def is_grouped(self) -> bool:
        """Whether all experts are computed in one call. grouped_mm wants rows that start at multiples of 16 bytes."""
        row_bytes = [n * self.down_EDF.dtype.itemsize for n in self.down_EDF.shape[1:]]
        return not any(n % 16 for n in row_bytes) and can_group(self.down_EDF.device, self.down_EDF.dtype)

    def regrouped(self, ids: tuple[int, ...], more: "LayerExperts") -> "LayerExperts":
        """The experts `ids` as a layer of their own; those that are not in this one come from `more`."""
        rows = {expert: (layer, row) for layer in (more, self) for row, expert in enumerate(layer.ids)}
        gate_up = [layer.gate_up_EFD[row] for layer, row in (rows[expert] for expert in ids)]
        down = [layer.down_EDF[row] for layer, row in (rows[expert] for expert in ids)]
        if not ids:
            return LayerExperts(ids, self.gate_up_EFD[:0], self.down_EDF[:0])
        return LayerExperts(ids, torch.stack(gate_up), torch.stack(down))

    def packed(self, compute: Compute, activation: Activation) -> "AnyExperts":
        """The same experts in the form that the actor computes with."""
        if compute.experts == "torch":
            return self
        if compute.experts == "native" and activation is F.silu:
            experts = NativeExperts.of(self.gate_up_EFD, self.down_EDF, compute.isa, compute.int8_experts)
            return FusedExperts(self.ids, experts)
        return PackedExperts.of(self, compute)


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """One layer's experts on a CPU, each a pair of packed matrices."""

    ids: tuple[int, ...]
    gate_up_E: tuple[FastLinear, ...]
    down_E: tuple[FastLinear, ...]
    compute: Compute
    is_grouped = False

    @classmethod
    def of(cls, plain: LayerExperts, compute: Compute) -> "PackedExperts":
        gate_up_E = tuple(pack_expert(gate_up_FD, compute) for gate_up_FD in plain.gate_up_EFD)
        return cls(plain.ids, gate_up_E, tuple(pack_expert(down_DF, compute) for down_DF in plain.down_EDF), compute)

    def regrouped(self, ids: tuple[int, ...], more: LayerExperts) -> "PackedExperts":
        """As LayerExperts.regrouped. Nothing is copied: each expert has matrices of its own."""
        new = PackedExperts.of(more, self.compute)
        known = {
            expert: matrices
            for layer in (new, self)
            for expert, *matrices in zip(layer.ids, layer.gate_up_E, layer.down_E, strict=True)
        }
        return replace(self, ids=ids, gate_up_E=tuple(known[e][0] for e in ids), down_E=tuple(known[e][1] for e in ids))

    def combine(self, x_TD: Tensor, choices: Choices, activation: Activation) -> Tensor:
        """As LayerExperts.combine."""
        return combine_sorted(self, x_TD, choices, activation)

    def run(self, x_PD: Tensor, ends_E: Tensor, activation: Activation) -> Tensor:
        """As LayerExperts.run."""
        y_PD = torch.empty_like(x_PD)
        for (start, end), gate_up, down in zip(_ranges(ends_E), self.gate_up_E, self.down_E, strict=True):
            if start < end:
                gate_F, up_F = gate_up(x_PD[start:end]).chunk(2, dim=-1)
                y_PD[start:end] = down(activation(gate_F) * up_F)
        return y_PD


@dataclass(frozen=True, slots=True)
class FusedExperts:
    """One layer's experts on a CPU, all computed in one call."""

    ids: tuple[int, ...]
    experts: NativeExperts

    def regrouped(self, ids: tuple[int, ...], more: LayerExperts) -> "FusedExperts":
        """As LayerExperts.regrouped."""
        new = NativeExperts.of(more.gate_up_EFD, more.down_EDF, self.experts.isa, self.experts.is_int8)
        rows = {expert: row for row, expert in enumerate((*self.ids, *more.ids))}
        return FusedExperts(ids, self.experts.select([rows[expert] for expert in ids], new))

    def combine(self, x_TD: Tensor, choices: Choices, activation: Activation) -> Tensor:
        """As LayerExperts.combine."""
        return self.experts.run(x_TD, choices.rows_TK, choices.gates_TK)


AnyExperts = LayerExperts | PackedExperts | FusedExperts


def combine_sorted(
    experts: LayerExperts | PackedExperts, x_TD: Tensor, choices: Choices, activation: Activation
) -> Tensor:
    """As LayerExperts.combine, for experts that want the pairs of each next to one another. Where rows are on a GPU,
    pairs that are computed elsewhere are carried along and masked in the end: to cut them off would be to wait. Nothing
    here waits for a GPU but a loop over experts whose rows are there.
    """
    num_tokens, top_k = choices.rows_TK.shape
    # One stable sort brings the pairs of an expert together, skipped ones (row E) last.
    rows_P, order_P = choices.rows_TK.flatten().sort(stable=True)
    numbers_E = torch.arange(len(experts.ids), device=rows_P.device)
    ends_E = torch.searchsorted(rows_P, numbers_E, right=True, out_int32=True)
    is_cut = is_on_host(rows_P)
    if is_cut:
        order_P = order_P[: int(ends_E[-1]) if len(ends_E) else 0]
    if experts.is_grouped and is_cut:
        order_P, ends_E = choices.staging.upload(order_P, ends_E)
    elif is_cut:
        (order_P,) = choices.staging.upload(order_P)
    elif not experts.is_grouped:
        (ends_E,) = choices.staging.download(ends_E)
    y_PD = experts.run(x_TD[order_P // top_k], ends_E, activation)
    weighted_PD = y_PD.float().mul_(choices.gates_TK.flatten()[order_P, None])
    if not is_cut:
        weighted_PD = torch.where(rows_P[:, None] < len(experts.ids), weighted_PD, 0)
    # Each pair has a place of its own and K places are summed in order: same bits every time, on GPUs as well.
    out_XD = torch.zeros(num_tokens * top_k, x_TD.shape[1], device=x_TD.device)
    out_XD[order_P] = weighted_PD
    return out_XD.view(num_tokens, top_k, x_TD.shape[1]).sum(1).to(x_TD.dtype)


def run_experts_grouped(experts: LayerExperts, x_PD: Tensor, ends_E: Tensor, activation: Activation) -> Tensor:
    """All experts in two grouped matrix products."""
    gate_PF, up_PF = F.grouped_mm(x_PD, experts.gate_up_EFD.transpose(1, 2), offs=ends_E).chunk(2, dim=-1)
    h_PF = activation(gate_PF) * up_PF
    return F.grouped_mm(h_PF, experts.down_EDF.transpose(1, 2), offs=ends_E)


def run_experts_loop(experts: LayerExperts, x_PD: Tensor, ends_E: Tensor, activation: Activation) -> Tensor:
    """One expert after the other: where grouped_mm can't be used, and the oracle of the faster ways."""
    y_PD = torch.empty_like(x_PD)
    for row, (start, end) in enumerate(_ranges(ends_E)):
        if start < end:
            gate_F, up_F = F.linear(x_PD[start:end], experts.gate_up_EFD[row]).chunk(2, dim=-1)
            y_PD[start:end] = F.linear(activation(gate_F) * up_F, experts.down_EDF[row])
    return y_PD


@cache
def can_group(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether grouped_mm has a kernel of its own. On GPUs it has one for bfloat16 and compute capabilities 9.x and
    10.x; elsewhere it reads the ends back and loops, in each of two products (ATen/native/GroupedMMUtils.h). The loop
    here takes ends that the host knows. A CPU waits for nobody, and torch's own loop is as good.
    """
    if device.type != "cuda":
        return True
    return dtype == torch.bfloat16 and torch.cuda.get_device_capability(device)[0] in (9, 10)


def is_on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _ranges(ends_E: Tensor) -> Iterator[tuple[int, int]]:
    return pairwise([0, *ends_E.tolist()])
