"""How fast attention reads keys and values in decodes, and multiplies in prompts, over the paged cache of one layer."""

import torch

from actors.compute import Compute
from actors.model.attention import AttentionRule, plan_attention
from actors.model.batch import Span, StepBatch
from actors.model.paged_kv import PagedKV
from actors.probe.stopwatch import usual_seconds
from actors.staging import DIRECT
from cluster.models.spec import LayerSpec, ModelSpec
from cluster.planning.cost import attention_cost
from cluster.planning.hardware import AttentionSpeed

BLOCK_SIZE = 16
DECODES, CONTEXT, PROMPT = 16, 512, 512


def attention_speed(spec: ModelSpec, compute: Compute, budget_s: float) -> AttentionSpeed:
    """Of decodes and of a whole prompt, each as if it were bound by the one limit alone."""
    decodes = DECODES * attention_cost(spec, LayerSpec(), 1, CONTEXT, 2).num_bytes
    prompt = attention_cost(spec, LayerSpec(), PROMPT, PROMPT, 2).flops
    return AttentionSpeed(
        gb_per_second=decodes / attending_seconds(spec, compute, [(1, CONTEXT)] * DECODES, budget_s / 2) / 1e9,
        tflops=prompt / attending_seconds(spec, compute, [(PROMPT, PROMPT)], budget_s / 2) / 1e12,
    )


def attending_seconds(spec: ModelSpec, compute: Compute, lengths: list[tuple[int, int]], budget_s: float) -> float:
    """Of one layer, for sequences with (new tokens, context), all alike; the step's share of making a plan left out."""
    new, context = lengths[0]
    blocks_each = -(-context // BLOCK_SIZE)
    kv = PagedKV(spec, len(lengths) * blocks_each, BLOCK_SIZE, compute)
    kv.k_LBSGC.normal_()
    kv.v_LBSGC.normal_()
    blocks_SB = torch.randperm(len(lengths) * blocks_each, dtype=torch.int32).view(len(lengths), -1)
    nothing = torch.empty(len(lengths) * new, dtype=torch.int64)
    spans = tuple(Span(i * new, new, context) for i in range(len(lengths)))
    plan = plan_attention(StepBatch(nothing, nothing, nothing, blocks_SB, nothing, spans), kv, compute, DIRECT)
    q_THC = torch.randn(len(nothing), spec.num_heads, spec.head_dim).to(compute.dtype)
    rule = AttentionRule(spec.attention_scale)

    def attend() -> None:
        # Layers in turn: a step finds none of them in the caches.
        for k_BSGC, v_BSGC in zip(kv.k_LBSGC, kv.v_LBSGC, strict=True):
            plan.attend(q_THC, k_BSGC, v_BSGC, rule)

    return usual_seconds(attend, budget_s) / spec.num_layers
