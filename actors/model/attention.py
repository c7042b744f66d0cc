"""Causal attention of a step's new tokens over the paged KV cache, with three back ends.

GatherPlan is plain torch and runs anywhere: it copies the keys and values that a sequence needs out of their blocks.
NativePlan reads blocks where they lie instead, on a CPU.
VarlenPlan is PyTorch's flash attention with block tables; it has not been run on a GPU yet.
A plan is made once per step; every layer then calls `attend`. New tokens are in the cache before they attend.

Shapes: T tokens, S sequences, N cached tokens of a sequence, B blocks, P slots of a block, H query heads, G key/value
heads, C head dimension.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import current_flash_attention_impl

from actors.compute import Compute
from actors.kernels.front_layer import NativeBatch
from actors.kernels.front_layer import attend as native_attend
from actors.model.batch import Span, StepBatch
from actors.model.paged_kv import PagedKV
from actors.staging import DIRECT, Staging

# Decodes of similar length are gathered together, at most so many cached tokens (64 MB of bf16 keys in a 1b-a400m
# layer): enough to keep cores busy, small enough that a step's scratch memory stays bounded.
GATHER_TOKENS = 65536


class AttentionPlan(ABC):
    @abstractmethod
    def attend(self, q_THC: Tensor, k_BPGC: Tensor, v_BPGC: Tensor, scale: float) -> Tensor:
        """softmax(scale * q.k) v over each sequence's own tokens up to the query's position: [T, H, C]."""


def plan_attention(batch: StepBatch, kv: PagedKV, compute: Compute, staging: Staging) -> AttentionPlan:
    if compute.attention == "flash" and not why_not_flash(kv.k_LBSGC.shape[-1], kv.block_size):
        return VarlenPlan(batch, staging)
    if compute.attention == "native" and kv.k_LBSGC.shape[-1] % 8 == 0:
        return NativePlan(batch, kv, compute.isa)
    return GatherPlan(batch, kv)


def why_not_flash(head_dim: int, block_size: int) -> str:
    """What flash attention refuses of a paged cache; empty if nothing."""
    if block_size % 256:
        return f"block_size={block_size} is no multiple of 256"
    return f"heads of {head_dim} are not among 8, 16, ..., 256" if head_dim % 8 or head_dim > 256 else ""


@dataclass(frozen=True, slots=True)
class Singles:
    """Sequences with one new token each. Padding slots point at the sequence's own first token: a slot that is
    masked must still hold finite numbers, for 0 * NaN is NaN."""

    rows_S: Tensor
    slots_SN: Tensor
    mask_SN: Tensor

    def attend(self, q_THC: Tensor, k_XGC: Tensor, v_XGC: Tensor, scale: float, out_THC: Tensor) -> None:
        q_SHC = q_THC[self.rows_S]
        k_SGNC, v_SGNC = (x_XGC[self.slots_SN].transpose(1, 2) for x_XGC in (k_XGC, v_XGC))
        # The query heads that share a key head stand where queries of one head usually stand: K is not repeated.
        q_SGRC = q_SHC.view(q_SHC.shape[0], k_SGNC.shape[1], -1, q_SHC.shape[2])
        o_SGRC = F.scaled_dot_product_attention(
            q_SGRC, k_SGNC, v_SGNC, attn_mask=self.mask_SN[:, None, None], scale=scale
        )
        out_THC[self.rows_S] = o_SGRC.flatten(1, 2)


@dataclass(frozen=True, slots=True)
class Stretch:
    """Several new tokens of one sequence. Without a mask, they are the whole sequence so far."""

    rows: slice
    slots_N: Tensor
    mask_TN: Tensor | None

    def attend(self, q_THC: Tensor, k_XGC: Tensor, v_XGC: Tensor, scale: float, out_THC: Tensor) -> None:
        k_GNC, v_GNC = (x_XGC[self.slots_N].transpose(0, 1) for x_XGC in (k_XGC, v_XGC))
        q_TGRC = q_THC[self.rows].view(-1, k_GNC.shape[0], q_THC.shape[1] // k_GNC.shape[0], q_THC.shape[2])
        q_GRTC = q_TGRC.permute(1, 2, 0, 3)
        # expand: every query head of a group reads the same keys, without a copy.
        k_GRNC, v_GRNC = (x[:, None].expand(-1, q_GRTC.shape[1], -1, -1) for x in (k_GNC, v_GNC))
        o_GRTC = F.scaled_dot_product_attention(
            q_GRTC, k_GRNC, v_GRNC, attn_mask=self.mask_TN, is_causal=self.mask_TN is None, scale=scale
        )
        out_THC[self.rows] = o_GRTC.permute(2, 0, 1, 3).flatten(1, 2)


class GatherPlan(AttentionPlan):
    def __init__(self, batch: StepBatch, kv: PagedKV) -> None:
        self.device, self.dtype = kv.k_LBSGC.device, kv.k_LBSGC.dtype
        self.block_size = kv.block_size
        num_single = batch.num_single
        assert all(span.length == 1 for span in batch.spans[:num_single]), "sequences with one new token come first"
        singles = batch.spans[:num_single]
        self.parts: list[Singles | Stretch] = [self._singles(batch, group) for group in group_by_length(singles)]
        self.parts += [
            self._stretch(span, blocks_B)
            for span, blocks_B in zip(batch.spans[num_single:], batch.blocks_SB[num_single:], strict=True)
        ]

    def attend(self, q_THC: Tensor, k_BPGC: Tensor, v_BPGC: Tensor, scale: float) -> Tensor:
        out_THC = q_THC.new_empty(q_THC.shape)
        k_XGC, v_XGC = k_BPGC.flatten(0, 1), v_BPGC.flatten(0, 1)
        for part in self.parts:
            part.attend(q_THC, k_XGC, v_XGC, scale, out_THC)
        return out_THC

    def _singles(self, batch: StepBatch, group: list[int]) -> Singles:
        contexts_S = torch.tensor([batch.spans[number].context for number in group], device=self.device)
        numbers_S = torch.tensor(group, device=self.device)
        steps_N = torch.arange(max(batch.spans[number].context for number in group), device=self.device)
        slots_SN = self._slots(batch.blocks_SB[numbers_S], steps_N)
        is_valid_SN = steps_N < contexts_S[:, None]
        slots_SN = torch.where(is_valid_SN, slots_SN, slots_SN[:, :1])
        rows_S = torch.tensor([batch.spans[number].start for number in group], device=self.device)
        return Singles(rows_S, slots_SN, self._additive(is_valid_SN))

    def _stretch(self, span: Span, blocks_B: Tensor) -> Stretch:
        steps_N = torch.arange(span.context, device=self.device)
        rows = slice(span.start, span.start + span.length)
        if span.length == span.context:
            return Stretch(rows, self._slots(blocks_B, steps_N), None)
        is_visible_TN = steps_N <= steps_N[-span.length :, None]
        return Stretch(rows, self._slots(blocks_B, steps_N), self._additive(is_visible_TN))

    def _slots(self, blocks_XB: Tensor, steps_N: Tensor) -> Tensor:
        return blocks_XB[..., steps_N // self.block_size].long() * self.block_size + steps_N % self.block_size

    def _additive(self, is_visible: Tensor) -> Tensor:
        return torch.zeros(is_visible.shape, dtype=self.dtype, device=self.device).masked_fill_(
            ~is_visible, float("-inf")
        )


def group_by_length(spans: tuple[Span, ...], max_tokens: int = GATHER_TOKENS) -> Iterator[list[int]]:
    """Numbers of the sequences, in groups whose longest context is less than twice the shortest (so that padding to
    the longest stays cheap) and whose padded size is at most `max_tokens`."""
    by_length = sorted(range(len(spans)), key=lambda number: -spans[number].context)
    group: list[int] = []
    for number in by_length:
        if group:
            longest = spans[group[0]].context
            if longest >= 2 * spans[number].context or longest * (len(group) + 1) > max_tokens:
                yield group
                group = []
        group.append(number)
    if group:
        yield group


class NativePlan(AttentionPlan):
    """Reads keys and values in their blocks (actors/kernels/attention.cpp). For linear layers that are not native;
    where they are, one call does a layer's whole half (front_layers.py).
    """

    def __init__(self, batch: StepBatch, kv: PagedKV, isa: int) -> None:
        self.isa = isa
        self.batch = native_batch(batch, kv.block_size)

    def attend(self, q_THC: Tensor, k_BPGC: Tensor, v_BPGC: Tensor, scale: float) -> Tensor:
        return native_attend(self.batch, q_THC.float(), k_BPGC, v_BPGC, scale, self.isa).to(q_THC.dtype)


def native_batch(batch: StepBatch, block_size: int, angles: tuple[Tensor, ...] = ()) -> NativeBatch:
    """The step as the kernels take it; attention alone needs no angles."""
    starts_S1 = torch.tensor([*(span.start for span in batch.spans), batch.num_tokens])
    contexts_S = torch.tensor([span.context for span in batch.spans])
    cos, sin = angles or (torch.empty(0), torch.empty(0))
    return NativeBatch(batch.slots_T, starts_S1, contexts_S, batch.blocks_SB, (cos, sin), block_size)


class VarlenPlan(AttentionPlan):
    """Not yet run on a GPU. Flash attention aligns its causal mask to the lower right, which is what a chunk needs.

    Flash attention 2, PyTorch's default, wants cumulative lengths of keys beside `seqused_k`; version 3 refuses both
    together. One split of the keys: with more, version 2 leaves rows of a paged batch unwritten
    (https://github.com/pytorch/pytorch/issues/194167), and a row would depend on the others of its step.
    """

    def __init__(self, batch: StepBatch, staging: Staging = DIRECT) -> None:
        contexts = [span.context for span in batch.spans]
        starts = [*(span.start for span in batch.spans), batch.num_tokens]
        tables = (torch.tensor(table, dtype=torch.int32) for table in (starts, contexts, [0, *accumulate(contexts)]))
        self.cu_seq_q, self.seqused_k, cu_seq_k = staging.upload(*tables)
        self.cu_seq_k = cu_seq_k if current_flash_attention_impl() is None else None
        self.max_q = max(span.length for span in batch.spans)
        self.max_k = max(contexts)
        # One query sees all its keys. To say that it is causal keeps query heads of a group from being packed.
        self.window = (-1, -1) if self.max_q == 1 else (-1, 0)
        self.block_table = batch.blocks_SB

    def attend(self, q_THC: Tensor, k_BPGC: Tensor, v_BPGC: Tensor, scale: float) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        out_THC = varlen_attn(
            q_THC, k_BPGC, v_BPGC, self.cu_seq_q, self.cu_seq_k, self.max_q, self.max_k,
            scale=scale, window_size=self.window, enable_gqa=True,
            seqused_k=self.seqused_k, block_table=self.block_table, num_splits=1,
        )  # fmt: skip
        assert isinstance(out_THC, Tensor)
        return out_THC
