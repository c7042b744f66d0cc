"""The attention of GPUs asks flash attention for what GatherPlan computes. Flash attention itself needs a GPU; what we
ask of it does not.
"""

from dataclasses import replace

import pytest
import torch

from actors.model import attention
from actors.model.attention import AttentionRule, GatherPlan, NativePlan, VarlenPlan, plan_attention, why_not_flash
from actors.model.batch import Span, StepBatch
from actors.model.paged_kv import PagedKV
from actors.staging import DIRECT
from tests.specs import PLAIN, spec_of
from tests.unit import flash_attention

PAGE = 256
SPEC = spec_of(
    {
        "vocab_size": 8,
        "hidden_size": 64,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    }
)
# Sequences of (new tokens, context with them).
STEPS = {
    "one decode": [(1, 700)],
    "decodes": [(1, 300), (1, 257), (1, 5), (1, 1024)],
    "page edges": [(1, 255), (1, 256), (1, 257), (1, 512), (1, 513), (1, 1)],
    "sixteen decodes": [(1, 257 + 90 * number) for number in range(16)],
    "a decode and a chunk": [(1, 600), (40, 340)],
    "a decode and a prompt": [(1, 600), (30, 30)],
    "chunks": [(256, 256), (256, 512), (7, 519)],
}


def step_of(lengths: list[tuple[int, int]]) -> tuple[StepBatch, PagedKV]:
    """Sequences whose pages lie in disorder; slots that were never written hold NaN."""
    pages_each = [-(-context // PAGE) for _, context in lengths]
    kv = PagedKV(SPEC, sum(pages_each) + 1, PAGE, PLAIN)
    for cache in (kv.k_LBSGC, kv.v_LBSGC):
        cache.fill_(float("nan"))
    free = torch.randperm(kv.num_blocks, generator=torch.Generator().manual_seed(0)).tolist()
    blocks = torch.full((len(lengths), max(pages_each)), free.pop(), dtype=torch.int32)
    spans, start = [], 0
    for row, (new, context) in enumerate(lengths):
        pages = torch.tensor([free.pop() for _ in range(pages_each[row])])
        blocks[row, : len(pages)] = pages
        slots = (pages[:, None] * PAGE + torch.arange(PAGE)).flatten()[:context]
        kv.write(0, slots, *(torch.randn(context, 2, 8) for _ in "kv"))
        spans.append(Span(start, new, context))
        start += new
    nothing = torch.zeros(start, dtype=torch.int64)
    return StepBatch(nothing, nothing, nothing, blocks, nothing, tuple(spans)), kv


RULES = {
    "all": AttentionRule(0.3),
    "window": AttentionRule(0.3, window=100),
    "window of one": AttentionRule(0.3, window=1),
    "sinks": AttentionRule(0.3, window=2000, sinks_H=torch.linspace(-3, 8, 8)),
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("rule", RULES)
def test_flash_attention_is_asked_for_what_is_gathered(name: str, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", flash_attention.varlen_attn)
    torch.manual_seed(0)
    batch, kv = step_of(STEPS[name])
    q_THC = torch.randn(batch.num_tokens, 8, 8)
    expected, actual = (
        plan.attend(q_THC, kv.k_LBSGC[0], kv.v_LBSGC[0], RULES[rule])
        for plan in (GatherPlan(batch, kv), VarlenPlan(batch))
    )
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("page", "head_dim", "reason"),
    [(256, 64, ""), (512, 256, ""), (16, 64, "block_size=16 is"), (256, 12, "heads of 12"), (256, 264, "heads of 264")],
)
def test_what_flash_attention_refuses_is_gathered(page: int, head_dim: int, reason: str) -> None:
    spec = replace(SPEC, head_dim=head_dim)
    kv = PagedKV(spec, 2, page, PLAIN)
    assert reason in why_not_flash(kv.k_LBSGC.shape[-1], kv.block_size)
    assert bool(why_not_flash(kv.k_LBSGC.shape[-1], kv.block_size)) == bool(reason)
    nothing = torch.zeros(1, dtype=torch.int64)
    batch = StepBatch(nothing, nothing, nothing, torch.zeros(1, 1, dtype=torch.int32), nothing, (Span(0, 1, 1),))
    plan = plan_attention(batch, kv, replace(PLAIN, attention="flash"), DIRECT)
    assert isinstance(plan, GatherPlan if reason else VarlenPlan)
    native = plan_attention(batch, kv, replace(PLAIN, attention="native"), DIRECT)
    assert isinstance(native, GatherPlan if head_dim % 8 else NativePlan)


def test_flash_attention_3_gets_no_cumulative_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, _ = step_of([(1, 300), (1, 5)])
    assert VarlenPlan(batch).cu_seq_k is not None
    monkeypatch.setattr(attention, "current_flash_attention_impl", lambda: "FA3")
    assert VarlenPlan(batch).cu_seq_k is None


def test_single_queries_are_not_called_causal() -> None:
    """So that the query heads of a group are packed."""
    decodes, mixed = VarlenPlan(step_of([(1, 300), (1, 5)])[0]), VarlenPlan(step_of([(1, 300), (2, 5)])[0])

    def sides(rule: AttentionRule) -> list[tuple[int, int]]:
        return [decodes.sides(rule), mixed.sides(rule)]

    assert sides(AttentionRule(1.0)) == [(-1, -1), (-1, 0)]
    assert sides(AttentionRule(1.0, window=300)) == [(-1, -1), (-1, 0)], "a window of all tokens hides nothing"
    assert sides(AttentionRule(1.0, window=7)) == [(6, 0), (6, 0)]
    assert sides(AttentionRule(1.0, sinks_H=torch.zeros(8))) == [(-1, 0), (-1, 0)]
