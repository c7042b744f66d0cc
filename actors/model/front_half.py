"""The front's half of GraniteMoE: embeddings, attention, router, norms, head. It holds no expert weights and does not
know where experts are: a Dispatcher does.

Shapes: T tokens of the step, R rows that need logits, D hidden, L layers, K top-k, E experts, H query heads,
G key/value heads, C head dimension, V vocabulary. Multipliers as in transformers' modeling_granitemoe.py.
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from actors.lanes.dispatcher import Dispatcher
from actors.model.attention import AttentionPlan, plan_attention
from actors.model.batch import StepBatch
from actors.model.layers import AnyLinear, rms_norm
from actors.model.moe import interleave, route
from actors.model.paged_kv import PagedKV, routed_dtype
from actors.model.rope import Rotary, apply_rotary
from cluster.model_config import GraniteMoeConfig

# Final hidden states of the rows that need logits [R, D], every token's experts [T, L, K].
Way = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """`qkv` is q, k and v stacked in this order: one matrix product instead of three."""

    attention_norm_D: Tensor
    qkv: AnyLinear
    out: AnyLinear
    moe_norm_D: Tensor
    router: AnyLinear


@dataclass(frozen=True, slots=True)
class FrontWeights:
    """`head` is the embedding itself when the model ties them."""

    embed_VD: Tensor
    layers: tuple[LayerWeights, ...]
    norm_D: Tensor
    head: AnyLinear


class FrontHalf:
    def __init__(self, config: GraniteMoeConfig, weights: FrontWeights) -> None:
        self.config = config
        self.weights = weights
        self.device = weights.embed_VD.device
        self.dtype = weights.embed_VD.dtype
        self.rotary = Rotary(config, self.device)

    def forward(
        self, batch: StepBatch, kv: PagedKV, dispatcher: Dispatcher, *, overlap: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Compute one step and write its keys, values and routing to the cache.

        Returns the final hidden states of `batch.rows_R` [R, D], for `logits`, and every token's experts [T, L, K].
        With `overlap`, the step's halves are two micro-batches: one is at attention while the other is at the experts.
        """
        micro_batches = batch.halves() if overlap else (batch,)
        ways = interleave([self._layers(each, kv, dispatcher) for each in micro_batches], dispatcher)
        if len(ways) == 1:
            return ways[0]
        hidden_RD, ids_TLK = (torch.cat(parts) for parts in zip(*ways, strict=True))
        return hidden_RD, ids_TLK

    def _layers(self, batch: StepBatch, kv: PagedKV, dispatcher: Dispatcher) -> Generator[Any, Tensor, Way]:
        """One micro-batch's way through the layers: yields what was dispatched, is sent what it combines to."""
        eps, residual = self.config.rms_norm_eps, self.config.residual_multiplier
        x_TD = F.embedding(batch.token_ids_T, self.weights.embed_VD) * self.config.embedding_multiplier
        angles = self.rotary.angles(batch.positions_T, self.dtype)
        plan = plan_attention(batch, kv)
        routed = []
        for number, layer in enumerate(self.weights.layers):
            h_TD = rms_norm(x_TD, layer.attention_norm_D, eps)
            h_TD = self._attention(number, layer, h_TD, angles, batch.slots_T, kv, plan)
            x_TD = torch.add(x_TD, h_TD, alpha=residual)
            h_TD = rms_norm(x_TD, layer.moe_norm_D, eps)
            ids_TK, gates_TK = route(h_TD, layer.router, self.config.num_experts_per_tok)
            h_TD = yield dispatcher.dispatch(number, h_TD, ids_TK, gates_TK)
            x_TD = torch.add(x_TD, h_TD, alpha=residual)
            routed.append(ids_TK)
        ids_TLK = torch.stack(routed, dim=1).to(routed_dtype(self.config.num_local_experts))
        kv.write_routed(batch.slots_T, ids_TLK)
        return rms_norm(x_TD[batch.rows_R], self.weights.norm_D, eps), ids_TLK

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """float32 [R, V]."""
        return self.weights.head(hidden_RD).float() / self.config.logits_scaling

    def _attention(
        self,
        number: int,
        layer: LayerWeights,
        x_TD: Tensor,
        angles: tuple[Tensor, Tensor],
        slots_T: Tensor,
        kv: PagedKV,
        plan: AttentionPlan,
    ) -> Tensor:
        num_q, num_kv = self.config.num_attention_heads, self.config.num_key_value_heads
        qkv_TNC = layer.qkv(x_TD).view(x_TD.shape[0], -1, self.config.head_dim)
        qk_TNC = apply_rotary(qkv_TNC[:, : num_q + num_kv], angles)
        q_THC, k_TGC = qk_TNC[:, :num_q], qk_TNC[:, num_q:]
        kv.write(number, slots_T, k_TGC, qkv_TNC[:, num_q + num_kv :])
        scale = self.config.attention_multiplier
        out_THC = plan.attend(q_THC, kv.k_LBSGC[number], kv.v_LBSGC[number], scale)
        return layer.out(out_THC.flatten(1))
