"""Attention over pages against its definition: VarlenPlan on a GPU, as a front calls it, and GatherPlan everywhere.

Shapes: T new tokens, S sequences, N cached tokens of a sequence, B pages, H query heads, G key/value heads, C their
width.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from actors.compute import Compute
from actors.model.attention import AttentionPlan, AttentionRule, GatherPlan, VarlenPlan, why_not_flash
from actors.model.batch import Span, StepBatch
from actors.model.paged_kv import PagedKV
from actors.staging import staging_for
from benchmarks.gpu_check.check import Check, Trial
from benchmarks.make_checkpoint import SHAPES
from cluster.models.family import parse_config

# Scores vary by about 1 then, so that no key is negligible and none is everything.
PAGE, SCALE = 256, 1 / 8
# As far as a row in this type may be from the definition, relative to the largest number of that row: over 4,096 keys
# means are small.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
SPEC = parse_config(SHAPES["1b-a400m"] | {"num_hidden_layers": 1})
# All tokens; a window; sinks, with a window that only long sequences feel.
RULES = (
    AttentionRule(SCALE),
    AttentionRule(SCALE, window=100),
    AttentionRule(SCALE, window=300, sinks_H=torch.linspace(-4, 8, SPEC.num_heads)),
)
# What a kernel may read and must mask: it would show, but is a number.
LARGE = 1e3


@dataclass(frozen=True, slots=True)
class Step:
    """`pages` are each sequence's own."""

    batch: StepBatch
    kv: PagedKV
    q_THC: Tensor
    pages: tuple[Tensor, ...]

    def attend(self, plan: AttentionPlan, rule: AttentionRule = RULES[0]) -> Tensor:
        sinks_H = None if rule.sinks_H is None else rule.sinks_H.to(self.q_THC)
        return plan.attend(self.q_THC, self.kv.k_LBSGC[0], self.kv.v_LBSGC[0], replace(rule, sinks_H=sinks_H))


def cases(most: int) -> dict[str, list[tuple[int, int]]]:
    """Sequences of (new tokens, context with them); contexts are at most `most`."""
    step = max(1, (most - 257) // 15)
    return {
        "one decode": [(1, most)],
        "two decodes": [(1, 257), (1, most)],
        "sixteen decodes": [(1, 257 + step * number) for number in range(16)],
        "page edges": [(1, context) for context in (255, 256, 257, 512, 513, 1)],
        "decode and chunk": [(1, 600), (40, 340)],
        "decode and prompt": [(1, 600), (300, 300)],
        "chunks": [(256, 256), (256, 512), (7, 519)],
    }


def make_step(lengths: list[tuple[int, int]], compute: Compute, unused: float) -> Step:
    """Pages lie in disorder. Those of nobody hold NaN, slots behind the end of a sequence hold `unused`."""
    generator = torch.Generator().manual_seed(0)
    pages_each = [-(-context // PAGE) for _, context in lengths]
    kv = PagedKV(SPEC, sum(pages_each) + 1, PAGE, compute)
    free = torch.randperm(kv.num_blocks, generator=generator).tolist()
    blocks_SB = torch.full((len(lengths), max(pages_each)), free.pop(), dtype=torch.int32)
    kv.k_LBSGC.fill_(float("nan"))
    kv.v_LBSGC.fill_(float("nan"))
    spans, owned, start = [], [], 0
    for row, (new, context) in enumerate(lengths):
        pages = torch.tensor([free.pop() for _ in range(pages_each[row])])
        blocks_SB[row, : len(pages)] = pages
        slots = (pages[:, None] * PAGE + torch.arange(PAGE)).flatten()
        for cache in (kv.k_LBSGC, kv.v_LBSGC):
            values = torch.full((len(slots), *cache.shape[3:]), unused)
            values[:context] = torch.randn(context, *cache.shape[3:], generator=generator)
            cache[0].flatten(0, 1)[slots.to(cache.device)] = values.to(cache)
        spans.append(Span(start, new, context))
        owned.append(pages)
        start += new
    q_THC = torch.randn(start, SPEC.num_heads, SPEC.head_dim, generator=generator).to(kv.k_LBSGC)
    nothing = torch.zeros(start, dtype=torch.int64)
    batch = StepBatch(nothing, nothing, nothing, blocks_SB, nothing, tuple(spans))
    return Step(batch.uploaded(staging_for(compute.device)), kv, q_THC, tuple(owned))


def define(step: Step, rule: AttentionRule) -> Tensor:
    """AttentionPlan.attend in float32 on the CPU, sequence by sequence."""
    outs = []
    for span, pages in zip(step.batch.spans, step.pages, strict=True):
        q_THC = step.q_THC[span.start : span.start + span.length].cpu().float()
        k_NHC, v_NHC = (
            cache[0]
            .cpu()[pages]
            .flatten(0, 1)[: span.context]
            .float()
            .repeat_interleave(q_THC.shape[1] // cache.shape[3], 1)
            for cache in (step.kv.k_LBSGC, step.kv.v_LBSGC)
        )
        scores_HTN = torch.einsum("thc,nhc->htn", q_THC, k_NHC) * SCALE
        at_T1 = torch.arange(span.context - span.length, span.context)[:, None]
        is_hidden_TN = torch.arange(span.context) > at_T1
        if rule.window:
            is_hidden_TN |= torch.arange(span.context) <= at_T1 - rule.window
        scores_HTN = scores_HTN.masked_fill(is_hidden_TN, float("-inf"))
        out_THC = torch.einsum("htn,nhc->thc", scores_HTN.softmax(-1), v_NHC)
        if rule.sinks_H is not None:
            out_THC *= (scores_HTN.logsumexp(-1).T - rule.sinks_H).sigmoid()[..., None]
        outs.append(out_THC)
    return torch.cat(outs)


def gathered(trial: Trial) -> None:
    """Slots that were never written may hold NaN: GatherPlan does not read them."""
    compute = Compute(trial.device, torch.bfloat16 if trial.is_on_gpu else torch.float32)
    _compare(trial, compute, float("nan"), lambda step: GatherPlan(step.batch, step.kv))


def flash(trial: Trial) -> None:
    """On the CPU, what would be asked of flash attention is only put together."""
    compute = Compute.choose(trial.device.type, "bfloat16")
    staging = staging_for(trial.device)
    if not trial.is_on_gpu:
        plans = [VarlenPlan(make_step(each, compute, LARGE).batch) for each in cases(trial.sizes.context).values()]
        trial.figures["plans made"] = len(plans)
        return
    first = make_step([(1, 300)], compute, LARGE)
    trial.expect(
        not why_not_flash(first.kv.k_LBSGC.shape[-1], first.kv.block_size), "a cache of the shape 1b-a400m is refused"
    )
    _compare(trial, compute, LARGE, lambda step: VarlenPlan(step.batch, staging))
    step = make_step([(1, 300), (1, 5)], compute, float("nan"))
    trial.figures["NaN in slots behind the end"] = (
        "does no harm" if step.attend(VarlenPlan(step.batch, staging)).isfinite().all() else "shows: zeroing is needed"
    )
    changed = [name for name, each in cases(trial.sizes.context).items() if _num_changed(each, compute)]
    trial.figures["rows change bits with their company in"] = ", ".join(changed) or "no case"
    decodes = [name for name in changed if "decodes" in name or name == "page edges"]
    trial.expect(not decodes, f"rows of decode steps change bits with their company: {', '.join(decodes)}")


def _compare(trial: Trial, compute: Compute, unused: float, plan: Callable[[Step], AttentionPlan]) -> None:
    worst = 0.0
    named = cases(trial.sizes.context).items()
    for (name, lengths), rule in product(named, RULES):
        step = make_step(lengths, compute, unused)
        expected_THC = define(step, rule)
        off_T = (step.attend(plan(step), rule).cpu().float() - expected_THC).abs().amax((1, 2))
        error = float((off_T / expected_THC.abs().amax((1, 2))).max())
        # NaN is not <= either.
        trial.expect(error <= TOLERANCE[compute.dtype], f"{name}, window {rule.window}: off by {error:.2g}")
        worst = error if error != error else max(worst, error)
    trial.figures[f"largest relative error, {str(compute.dtype).removeprefix('torch.')}"] = f"{worst:.1e}"


def _num_changed(lengths: list[tuple[int, int]], compute: Compute) -> int:
    """Sequences whose rows have other bits than if they were computed alone, from the same pages."""
    step, staging = make_step(lengths, compute, LARGE), staging_for(compute.device)
    together, changed = step.attend(VarlenPlan(step.batch, staging)), 0
    for number, span in enumerate(step.batch.spans):
        rows = slice(span.start, span.start + span.length)
        blocks_SB = step.batch.blocks_SB[number : number + 1]
        nothing = step.batch.token_ids_T[rows]
        batch = StepBatch(nothing, nothing, nothing, blocks_SB, nothing, (Span(0, span.length, span.context),))
        alone = Step(batch, step.kv, step.q_THC[rows], ())
        changed += not torch.equal(alone.attend(VarlenPlan(batch, staging)), together[rows])
    return changed


CHECKS = (
    Check("gathered attention", "plain torch over pages computes what attention is defined as", gathered),
    Check("flash attention", "varlen_attn with block tables computes what attention is defined as", flash),
)
