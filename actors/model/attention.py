"""Causal attention of a step's new tokens over the paged KV cache, with three back ends.

GatherPlan is plain torch and runs anywhere: it copies the keys and values that a sequence needs out of their blocks.
NativePlan reads blocks where they lie instead, on a CPU.
VarlenPlan is PyTorch's flash attention with block tables; it has not been run on a GPU yet.
The file is long because the three stand side by side: what one does, the others must.
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


@dataclass(frozen=True, slots=True)
class AttentionRule:
    """How a layer attends: `scale` of scores; tokens in its `window`, the query's own included; sinks, which take
    their share of a head's attention: it is multiplied by sigmoid(logsumexp(scores) - sink), in float32.
    """

    scale: float
    window: int | None = None
    sinks_H: Tensor | None = None


class AttentionPlan(ABC):
    @abstractmethod
    def attend(self, q_THC: Tensor, k_BPGC: Tensor, v_BPGC: Tensor, rule: AttentionRule) -> Tensor:
        """softmax(scale * q.k) v over each sequence's own tokens up to the query's position: [T, H, C]."""


def weigh(
    q_XGRC: Tensor, k_XGNC: Tensor, v_XGNC: Tensor, mask: Tensor | None, scale: float, sinks: Tensor | None
) -> Tensor:
    """softmax(scale * q.k + mask) v; without a mask, query number i sees keys up to number i. With sinks, which have
    a shape like that of q without C, the steps are those of the reference.
    """
    if sinks is None:
        return F.scaled_dot_product_attention(
            q_XGRC, k_XGNC, v_XGNC, attn_mask=mask, is_causal=mask is None, scale=scale
        )
    scores = q_XGRC @ k_XGNC.transpose(-1, -2) * scale
    if mask is None:
        mask = torch.full(scores.shape[-2:], float("-inf"), dtype=scores.dtype, device=scores.device).triu_(1)
    scores += mask
    share = torch.sigmoid(scores.float().logsumexp(-1) - sinks.float())
    weights = scores.softmax(-1, dtype=torch.float32).to(v_XGNC.dtype)
    return weights @ v_XGNC * share[..., None].to(v_XGNC.dtype)


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

    def attend(self, q_THC: Tensor, k_XGC: Tensor, v_XGC: Tensor, rule: AttentionRule, out_THC: Tensor) -> None:
        q_SHC = q_THC[self.rows_S]
        k_SGNC, v_SGNC = (x_XGC[self.slots_SN].transpose(1, 2) for x_XGC in (k_XGC, v_XGC))
        # The query heads that share a key head stand where queries of one head usually stand: K is not repeated.
        q_SGRC = q_SHC.view(q_SHC.shape[0], k_SGNC.shape[1], -1, q_SHC.shape[2])
        sinks_GR = None if rule.sinks_H is None else rule.sinks_H.view(q_SGRC.shape[1:3])
        o_SGRC = weigh(q_SGRC, k_SGNC, v_SGNC, self.mask_SN[:, None, None], rule.scale, sinks_GR)
        out_THC[self.rows_S] = o_SGRC.flatten(1, 2)


@dataclass(frozen=True, slots=True)
class Stretch:
    """Several new tokens of one sequence. Without a mask, they are the whole sequence so far."""

    rows: slice
    slots_N: Tensor
    mask_TN: Tensor | None

    def attend(self, q_THC: Tensor, k_XGC: Tensor, v_XGC: Tensor, rule: AttentionRule, out_THC: Tensor) -> None:
        k_GNC, v_GNC = (x_XGC[self.slots_N].transpose(0, 1) for x_XGC in (k_XGC, v_XGC))
        q_TGRC = q_THC[self.rows].view(-1, k_GNC.shape[0], q_THC.shape[1] // k_GNC.shape[0], q_THC.shape[2])
        q_GRTC = q_TGRC.permute(1, 2, 0, 3)
        # expand: every query head of a group reads the same keys, without a copy.
        k_GRNC, v_GRNC = (x[:, None].expand(-1, q_GRTC.shape[1], -1, -1) for x in (k_GNC, v_GNC))
        sinks_GR1 = None if rule.sinks_H is None else rule.sinks_H.view(*q_GRTC.shape[:2], 1)
        o_GRTC = weigh(q_GRTC, k_GRNC, v_GRNC, self.mask_TN, rule.scale, sinks_GR1)
        out_THC[self.rows] = o_GRTC.permute(2, 0, 1, 3).flatten(1, 2)


class GatherPlan(AttentionPlan):
    def __init__(self, batch: StepBatch, kv: PagedKV) -> None:
        self.device, self.dtype = kv.k_LBSGC.device, kv.k_LBSGC.dtype
        self.block_size = kv.block_size
        self.batch = batch
        num_single = batch.num_single
        assert all(span.length == 1 for span in batch.spans[:num_single]), "sequences with one new token come first"
        self._parts: dict[int | None, list[Singles | Stretch]] = {}  # by window, made when a layer first asks

    def attend(self, q_THC: Tensor, k_BPGC: Tensor, v_BPGC: Tensor, rule: AttentionRule) -> Tensor:
        if rule.window not in self._parts:
            self._parts[rule.window] = list(self._cut(rule.window))
        out_THC = q_THC.new_empty(q_THC.shape)
        k_XGC, v_XGC = k_BPGC.flatten(0, 1), v_BPGC.flatten(0, 1)
        for part in self._parts[rule.window]:
            part.attend(q_THC, k_XGC, v_XGC, rule, out_THC)
        return out_THC

    def _cut(self, window: int | None) -> Iterator[Singles | Stretch]:
        batch, num_single = self.batch, self.batch.num_single
        for group in group_by_length(batch.spans[:num_single]):
            yield self._singles(group, window)
        for span, blocks_B in zip(batch.spans[num_single:], batch.blocks_SB[num_single:], strict=True):
            yield self._stretch(span, blocks_B, window)

    def _singles(self, group: list[int], window: int | None) -> Singles:
        batch = self.batch
        contexts_S = torch.tensor([batch.spans[number].context for number in group], device=self.device)
        seen_S = contexts_S if window is None else contexts_S.clamp(max=window)
        most = max(min(batch.spans[number].context, window or batch.spans[number].context) for number in group)
        numbers_S = torch.tensor(group, device=self.device)
        steps_N = torch.arange(most, device=self.device)
        is_valid_SN = steps_N < seen_S[:, None]
        tokens_SN = (contexts_S - seen_S)[:, None] + torch.where(is_valid_SN, steps_N, 0)
        slots_SN = self._slots(batch.blocks_SB[numbers_S], tokens_SN)
        rows_S = torch.tensor([batch.spans[number].start for number in group], device=self.device)
        return Singles(rows_S, slots_SN, self._additive(is_valid_SN))

    def _stretch(self, span: Span, blocks_B: Tensor, window: int | None) -> Stretch:
        """Queries stand behind the keys of earlier tokens, of which a window hides those that none of them sees."""
        rows, window = slice(span.start, span.start + span.length), window or span.context
        first = max(0, span.context - span.length - window + 1)
        tokens_N = torch.arange(first, span.context, device=self.device)
        slots_N = self._slots(blocks_B[None], tokens_N[None])[0]
        if span.length == span.context <= window:
            return Stretch(rows, slots_N, None)
        own_T1 = tokens_N[-span.length :, None]
        is_visible_TN = (tokens_N <= own_T1) & (tokens_N > own_T1 - window)
        return Stretch(rows, slots_N, self._additive(is_visible_TN))

    def _slots(self, blocks_SB: Tensor, tokens_SN: Tensor) -> Tensor:
        blocks_SN = blocks_SB.gather(1, (tokens_SN // self.block_size))
        return blocks_SN.long() * self.block_size + tokens_SN % self.block_size

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

    def attend(self, q_THC: Tensor, k_BPGC: Tensor, v_BPGC: Tensor, rule: AttentionRule) -> Tensor:
        out_THC = native_attend(
            self.batch, q_THC.float(), k_BPGC, v_BPGC, rule.scale, self.isa, rule.window, rule.sinks_H
        )
        return out_THC.to(q_THC.dtype)


def native_batch(batch: StepBatch, block_size: int, angles: tuple[Tensor, Tensor] | None = None) -> NativeBatch:
    """The step as the kernels take it; attention alone needs no angles."""
    starts_S1 = torch.tensor([*(span.start for span in batch.spans), batch.num_tokens])
    contexts_S = torch.tensor([span.context for span in batch.spans])
    return NativeBatch(batch.slots_T, starts_S1, contexts_S, batch.blocks_SB, angles, block_size)


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
        self.block_table = batch.blocks_SB

    def attend(self, q_THC: Tensor, k_BPGC: Tensor, v_BPGC: Tensor, rule: AttentionRule) -> Tensor:
        from torch.nn.attention.varlen import AuxRequest, varlen_attn

        found = varlen_attn(
            q_THC, k_BPGC, v_BPGC, self.cu_seq_q, self.cu_seq_k, self.max_q, self.max_k,
            return_aux=None if rule.sinks_H is None else AuxRequest(lse=True),
            scale=rule.scale, window_size=self.sides(rule), enable_gqa=True,
            seqused_k=self.seqused_k, block_table=self.block_table, num_splits=1,
        )  # fmt: skip
        if rule.sinks_H is None:
            assert isinstance(found, Tensor)
            return found
        out_THC, lse_HT = found  # not [T, H], as its documentation says: the kernel's own order is passed on
        return out_THC * torch.sigmoid(lse_HT.T.float() - rule.sinks_H.float())[..., None].to(out_THC.dtype)

    def sides(self, rule: AttentionRule) -> tuple[int, int]:
        """How many tokens to its left and right a query sees; -1 is all of them."""
        if rule.window is not None and rule.window < self.max_k:
            return (rule.window - 1, 0)
        # One query sees all its keys. To say that it is causal keeps query heads of a group from being packed; with
        # sinks that is wanted, for nobody documents in what order packed heads have their log-sum-exps.
        return (-1, -1) if self.max_q == 1 and rule.sinks_H is None else (-1, 0)
