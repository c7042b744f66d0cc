"""The experts' half of GraniteMoE: stateless, same inputs, same outputs.

Knows the weights it holds and which global experts they are; knows nothing of routing, requests or other replicas.

Shapes: T tokens, D hidden, F expert hidden, K top-k, E experts held of a layer, P (token, choice) pairs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from actors.kernels.native import NativeExperts, fastest
from actors.kernels.packed import FastLinear, are_experts_int8, can_pack, pack_expert, use_native
from cluster.models.granite_moe import GraniteMoeConfig

Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
SKIP = -1


class NotHeld(LookupError):  # noqa: N818 - an answer, not a failure
    """An expert was asked for that is not here: the sender's expert map is out of date."""

    def __init__(self, layer: int, expert: int) -> None:
        super().__init__(f"expert {expert} of layer {layer} is not held here")
        self.layer = layer
        self.expert = expert


@dataclass(frozen=True, slots=True)
class LayerExperts:
    """One layer's experts. Row i of the weights is global expert `ids[i]`; gate rows come before up rows."""

    ids: tuple[int, ...]
    gate_up_EFD: Tensor
    down_EDF: Tensor

    def combine(self, x_TD: Tensor, rows_TK: Tensor, gates_TK: Tensor, activation: Activation) -> Tensor:
        """Sum of gate * expert(x) over each token's choices, [T, D]; rows_TK int64, E and more: computed elsewhere."""
        return combine_sorted(self, x_TD, rows_TK, gates_TK, activation)

    def run(self, x_PD: Tensor, counts_E: Tensor, activation: Activation) -> Tensor:
        """expert(x) for pairs sorted by expert, `counts_E` pairs of each: [P, D]."""
        # grouped_mm wants rows that start at multiples of 16 bytes.
        row_bytes = [n * self.down_EDF.dtype.itemsize for n in self.down_EDF.shape[1:]]
        run = run_experts_loop if any(n % 16 for n in row_bytes) else run_experts_grouped
        return run(self, x_PD, counts_E, activation)

    def regrouped(self, ids: tuple[int, ...], more: "LayerExperts") -> "LayerExperts":
        """The experts `ids` as a layer of their own; those that are not in this one come from `more`."""
        rows = {expert: (layer, row) for layer in (more, self) for row, expert in enumerate(layer.ids)}
        gate_up = [layer.gate_up_EFD[row] for layer, row in (rows[expert] for expert in ids)]
        down = [layer.down_EDF[row] for layer, row in (rows[expert] for expert in ids)]
        if not ids:
            return LayerExperts(ids, self.gate_up_EFD[:0], self.down_EDF[:0])
        return LayerExperts(ids, torch.stack(gate_up), torch.stack(down))

    def packed(self, activation: Activation) -> "AnyExperts":
        """The same experts in a faster form, where there is one."""
        if not can_pack(self.down_EDF):
            return self
        if use_native(are_experts_int8()) and activation is F.silu:
            experts = NativeExperts.of(self.gate_up_EFD, self.down_EDF, fastest(), are_experts_int8())
            return FusedExperts(self.ids, experts)
        return PackedExperts.of(self)


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """One layer's experts on a CPU, each a pair of packed matrices."""

    ids: tuple[int, ...]
    gate_up_E: tuple[FastLinear, ...]
    down_E: tuple[FastLinear, ...]

    @classmethod
    def of(cls, plain: LayerExperts) -> "PackedExperts":
        return cls(plain.ids, tuple(map(pack_expert, plain.gate_up_EFD)), tuple(map(pack_expert, plain.down_EDF)))

    def regrouped(self, ids: tuple[int, ...], more: LayerExperts) -> "PackedExperts":
        """As LayerExperts.regrouped. Nothing is copied: each expert has matrices of its own."""
        new = PackedExperts.of(more)
        known = {
            expert: matrices
            for layer in (new, self)
            for expert, *matrices in zip(layer.ids, layer.gate_up_E, layer.down_E, strict=True)
        }
        return PackedExperts(ids, tuple(known[e][0] for e in ids), tuple(known[e][1] for e in ids))

    def combine(self, x_TD: Tensor, rows_TK: Tensor, gates_TK: Tensor, activation: Activation) -> Tensor:
        """As LayerExperts.combine."""
        return combine_sorted(self, x_TD, rows_TK, gates_TK, activation)

    def run(self, x_PD: Tensor, counts_E: Tensor, activation: Activation) -> Tensor:
        """As LayerExperts.run."""
        y_PD = torch.empty_like(x_PD)
        start = 0
        for gate_up, down, count in zip(self.gate_up_E, self.down_E, counts_E.tolist(), strict=True):
            if count:
                here = slice(start, start + count)
                gate_F, up_F = gate_up(x_PD[here]).chunk(2, dim=-1)
                y_PD[here] = down(activation(gate_F) * up_F)
                start += count
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

    def combine(self, x_TD: Tensor, rows_TK: Tensor, gates_TK: Tensor, activation: Activation) -> Tensor:
        """As LayerExperts.combine."""
        return self.experts.run(x_TD, rows_TK, gates_TK)


AnyExperts = LayerExperts | PackedExperts | FusedExperts


class ExpertStore:
    def __init__(
        self,
        config: GraniteMoeConfig,
        layers: tuple[AnyExperts, ...],
        device: torch.device | None = None,
    ) -> None:
        self.config = config
        self.layers = list(layers)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.device = device or torch.device("cpu")
        self.num_experts = config.num_local_experts
        self._rows = [self._row_table(layer.ids) for layer in layers]

    @property
    def held(self) -> tuple[tuple[int, ...], ...]:
        """Per layer, the global ids of the experts that are here."""
        return tuple(layer.ids for layer in self.layers)

    def replace(self, layer: int, experts: AnyExperts) -> None:
        """Hold these experts of a layer from now on. Must not run while run() does."""
        self.layers[layer], self._rows[layer] = experts, self._row_table(experts.ids)

    def run(self, layer: int, x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """Sum of gate * expert(x) over those of each token's choices that are not -1, [T, D] in the type of x.

        ids are global expert ids, int64. Sums are kept in float32. Raises NotHeld.
        """
        rows_TK = self._local_rows(layer, ids_TK)
        return self.layers[layer].combine(x_TD, rows_TK, gates_TK, self.activation)

    def _row_table(self, ids: tuple[int, ...]) -> Tensor:
        """Global id -> row. Entry -1 (the last, as an index) stands for skipped choices and maps past the last row;
        ids that are not held map to -1, and so does every number past the last expert."""
        table = torch.full((self.num_experts + 2,), -1)
        table[list(ids)] = torch.arange(len(ids))
        table[SKIP] = len(ids)
        return table.to(self.device)

    def _local_rows(self, layer: int, ids_TK: Tensor) -> Tensor:
        rows_TK = self._rows[layer][ids_TK.clamp(SKIP, self.num_experts)]
        if rows_TK.numel() and int(rows_TK.min()) < 0:
            raise NotHeld(layer, int(ids_TK[rows_TK < 0][0]))
        return rows_TK


def combine_sorted(
    experts: LayerExperts | PackedExperts, x_TD: Tensor, rows_TK: Tensor, gates_TK: Tensor, activation: Activation
) -> Tensor:
    """As LayerExperts.combine, for experts that want the pairs of each next to one another."""
    num_tokens, top_k = rows_TK.shape
    # One stable sort brings the pairs of an expert together, skipped ones (row E) last.
    rows_P, order_P = rows_TK.flatten().sort(stable=True)
    counts_E = torch.bincount(rows_P, minlength=len(experts.ids) + 1)[:-1]
    order_P = order_P[: int(counts_E.sum())]
    y_PD = experts.run(x_TD[order_P // top_k], counts_E, activation)
    weighted_PD = y_PD.float().mul_(gates_TK.flatten()[order_P, None])
    # Each pair has a place of its own and K places are summed in order: same bits every time, on GPUs as well.
    out_XD = torch.zeros(num_tokens * top_k, x_TD.shape[1], device=x_TD.device)
    out_XD[order_P] = weighted_PD
    return out_XD.view(num_tokens, top_k, x_TD.shape[1]).sum(1).to(x_TD.dtype)


def run_experts_grouped(experts: LayerExperts, x_PD: Tensor, counts_E: Tensor, activation: Activation) -> Tensor:
    """All experts in two grouped matrix products."""
    ends_E = counts_E.cumsum(0).to(torch.int32)
    gate_PF, up_PF = F.grouped_mm(x_PD, experts.gate_up_EFD.transpose(1, 2), offs=ends_E).chunk(2, dim=-1)
    h_PF = activation(gate_PF) * up_PF
    return F.grouped_mm(h_PF, experts.down_EDF.transpose(1, 2), offs=ends_E)


def run_experts_loop(experts: LayerExperts, x_PD: Tensor, counts_E: Tensor, activation: Activation) -> Tensor:
    """One expert after the other: for widths that grouped_mm refuses, and the oracle of the faster ways."""
    y_PD = torch.empty_like(x_PD)
    start = 0
    for row, count in enumerate(counts_E.tolist()):
        here = slice(start, start + count)
        gate_F, up_F = F.linear(x_PD[here], experts.gate_up_EFD[row]).chunk(2, dim=-1)
        y_PD[here] = F.linear(activation(gate_F) * up_F, experts.down_EDF[row])
        start += count
    return y_PD
