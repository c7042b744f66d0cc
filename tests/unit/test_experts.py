"""The expert half: what a replica returns for any mix of tokens, choices and held experts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.activations import ACT2FN

from actors.activations import ACTIVATIONS
from actors.experts.layer_experts import LayerExperts, run_experts_grouped, run_experts_loop
from actors.experts.store import ExpertStore, NotHeld
from cluster.models import decoder
from cluster.models.spec import ModelSpec
from tests.specs import PLAIN, spec_of

NUM_EXPERTS = 6


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    torch.set_num_threads(1)


def config(hidden: int = 16, width: int = 8, act: str = "silu") -> ModelSpec:
    return spec_of(
        {
            "vocab_size": 10,
            "hidden_size": hidden,
            "intermediate_size": width,
            "num_hidden_layers": 2,
            "num_attention_heads": 1,
            "num_local_experts": NUM_EXPERTS,
            "hidden_act": act,
        }
    )


def layer(ids: tuple[int, ...], cfg: ModelSpec, number: int = 0, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(number)
    gate_up = torch.randn(NUM_EXPERTS, 2 * cfg.expert_size, cfg.hidden_size, generator=generator)
    down = torch.randn(NUM_EXPERTS, cfg.hidden_size, cfg.expert_size, generator=generator)
    return LayerExperts(ids, gate_up[list(ids)].to(dtype), down[list(ids)].to(dtype))


def store(*ids: tuple[int, ...], cfg: ModelSpec | None = None, dtype: torch.dtype = torch.float32):
    cfg = cfg or config()
    return ExpertStore(cfg, tuple(layer(i, cfg, number, dtype) for number, i in enumerate(ids)), PLAIN)


def by_definition(weights: LayerExperts, x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
    out_TD = torch.zeros_like(x_TD)
    for token, (ids, gates) in enumerate(zip(ids_TK.tolist(), gates_TK, strict=True)):
        for expert, gate in zip(ids, gates, strict=True):
            if expert >= 0:
                row = weights.ids.index(expert)
                a, b = (weights.gate_up_EFD[row] @ x_TD[token]).chunk(2)
                out_TD[token] += gate * (weights.down_EDF[row] @ (a / (1 + torch.exp(-a)) * b))
    return out_TD


@settings(max_examples=40, deadline=None)
@given(
    held=st.lists(st.integers(0, NUM_EXPERTS - 1), unique=True, min_size=1).map(tuple),
    num_tokens=st.integers(0, 9),
    top_k=st.integers(1, 4),
    seed=st.integers(0, 99),
    width=st.sampled_from([8, 5]),
)
def test_run_is_the_gated_sum_over_the_choices_that_are_here(held, num_tokens, top_k, seed, width):
    torch.manual_seed(seed)
    experts = store(held, held, cfg=config(width=width))
    x_TD, gates_TK = torch.randn(num_tokens, 16), torch.rand(num_tokens, top_k)
    ids_TK = torch.tensor([*held, -1])[torch.randint(len(held) + 1, (num_tokens, top_k))]
    out_TD = experts.run(0, x_TD, ids_TK, gates_TK)
    torch.testing.assert_close(out_TD, by_definition(experts.layers[0], x_TD, ids_TK, gates_TK), atol=1e-3, rtol=1e-4)
    assert torch.equal(out_TD, experts.run(0, x_TD, ids_TK, gates_TK)), "same inputs, same bits"


def test_groups_together_give_what_one_store_gives():
    torch.manual_seed(0)
    x_TD, gates_TK = torch.randn(20, 16), torch.rand(20, 3)
    ids_TK = torch.stack([torch.randperm(NUM_EXPERTS)[:3] for _ in range(20)])
    whole = store(tuple(range(NUM_EXPERTS))).run(0, x_TD, ids_TK, gates_TK)
    partials = [
        store(group).run(0, x_TD, torch.where(torch.isin(ids_TK, torch.tensor(group)), ids_TK, -1), gates_TK)
        for group in ((0, 4, 5), (1, 2), (3,))
    ]
    torch.testing.assert_close(sum(partials), whole, atol=1e-4, rtol=1e-5)


def test_layers_have_their_own_experts():
    experts = store((0, 1), (2, 3))
    x_TD, gates_TK = torch.randn(1, 16), torch.ones(1, 1)
    out_TD = experts.run(1, x_TD, torch.tensor([[3]]), gates_TK)
    torch.testing.assert_close(out_TD, by_definition(experts.layers[1], x_TD, torch.tensor([[3]]), gates_TK))
    assert experts.held == ((0, 1), (2, 3))


@pytest.mark.parametrize("expert", [0, 2, NUM_EXPERTS, 10**6])
def test_an_expert_that_is_not_here_is_named(expert: int):
    with pytest.raises(NotHeld, match=f"expert {expert} of layer 1") as caught:
        store((1,), (1, 3)).run(1, torch.randn(2, 16), torch.tensor([[1, -1], [3, expert]]), torch.ones(2, 2))
    assert (caught.value.layer, caught.value.expert) == (1, expert)


def test_grouped_equals_loop():
    weights, ends_E = layer((0, 2, 3), config()), torch.tensor([3, 3, 7], dtype=torch.int32)
    x_PD = torch.randn(7, 16)
    both = [run(weights, x_PD, ends_E, ACTIVATIONS["silu"]) for run in (run_experts_grouped, run_experts_loop)]
    torch.testing.assert_close(*both, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("hidden", "width"), [(16, 5), (10, 8), (6, 7)])
def test_widths_that_grouped_mm_refuses_go_through_the_loop(hidden: int, width: int):
    experts = store((0, 1), (0,), cfg=config(hidden, width))
    x_TD, ids_TK, gates_TK = torch.randn(3, hidden), torch.tensor([[0], [1], [0]]), torch.rand(3, 1)
    expected = by_definition(experts.layers[0], x_TD, ids_TK, gates_TK)
    torch.testing.assert_close(experts.run(0, x_TD, ids_TK, gates_TK), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("act", decoder.ACTIVATIONS)
def test_activations_are_those_of_transformers(act: str):
    x = torch.linspace(-6, 6, 101)
    ours = ACTIVATIONS[config(act=act).activation]
    torch.testing.assert_close(ours(x), ACT2FN[act](x), atol=1e-6, rtol=1e-6)


def test_bfloat16_sums_are_kept_in_float32():
    """256 + 1 + 1 + ... is stuck at 256 in bfloat16."""
    cfg = config(width=8)
    weights = LayerExperts((0, 1), torch.zeros(2, 16, 16), torch.zeros(2, 16, 8))
    weights.gate_up_EFD[:, 0, 0] = weights.gate_up_EFD[:, 8, 0] = 30.0
    weights.down_EDF[0, 0, 0], weights.down_EDF[1, 0, 0] = 256 / 900, 1 / 900
    low = LayerExperts((0, 1), weights.gate_up_EFD.bfloat16(), weights.down_EDF.bfloat16())
    x_TD = torch.zeros(1, 16, dtype=torch.bfloat16)
    x_TD[0, 0] = 1.0
    ids_TK = torch.tensor([[0, 1, 1, 1, 1]])
    out_TD = ExpertStore(cfg, (low, low), PLAIN).run(0, x_TD, ids_TK, torch.ones(1, 5, dtype=torch.bfloat16))
    assert out_TD.dtype == torch.bfloat16
    assert out_TD[0, 0].item() == 260.0


def test_bfloat16_gates_are_applied_in_float32():
    torch.manual_seed(0)
    experts = store(tuple(range(NUM_EXPERTS)), dtype=torch.bfloat16)
    x_TD, gates_TK = torch.randn(8, 16).bfloat16(), torch.rand(8, NUM_EXPERTS).bfloat16()
    ids_TK = torch.arange(NUM_EXPERTS).expand(8, -1)
    alone_TKD = torch.stack([experts.run(0, x_TD, ids_TK[:, k : k + 1], torch.ones(8, 1)) for k in range(6)], 1)
    expected_TD = (alone_TKD.float() * gates_TK[..., None].float()).sum(1).bfloat16()
    assert torch.equal(experts.run(0, x_TD, ids_TK, gates_TK), expected_TD)
