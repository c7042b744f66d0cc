"""Packed matrices compute what the plain ones do."""

import pytest
import torch

from actors.kernels import packed
from actors.kernels.packed import can_pack, pack
from actors.model import expert_half
from actors.model.expert_half import ACTIVATIONS, LayerExperts, PackedExperts
from actors.model.layers import Linear


@pytest.fixture(params=[True, False], ids=["packed", "widened"], autouse=True)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forms that torch computes with, as far as this CPU can. tests/unit/test_native.py has our own."""
    if request.param and not packed.has_bfloat16():
        pytest.skip("this CPU or build has no oneDNN bfloat16")
    monkeypatch.setattr(packed, "has_bfloat16", lambda: request.param)
    for module in (packed, expert_half):
        monkeypatch.setattr(module, "use_native", lambda: False)
    monkeypatch.setattr(packed, "PIECE", 256)  # several pieces even in the small matrices below


@pytest.mark.parametrize("num_tokens", [1, 3, 64])
@pytest.mark.parametrize("has_bias", [False, True])
def test_packed_linear_is_the_plain_one(num_tokens: int, has_bias: bool) -> None:
    weight, x = torch.randn(24, 16).bfloat16(), torch.randn(num_tokens, 16).bfloat16()
    bias = torch.randn(24).bfloat16() if has_bias else None
    torch.testing.assert_close(pack(weight, bias)(x), Linear(weight, bias)(x), atol=0.05, rtol=0.02)


def test_packed_experts_are_the_plain_ones() -> None:
    torch.manual_seed(0)
    plain = LayerExperts((1, 4, 6), torch.randn(3, 32, 24).bfloat16() / 5, torch.randn(3, 24, 16).bfloat16() / 4)
    fast = plain.packed(ACTIVATIONS["silu"])
    assert isinstance(fast, PackedExperts)
    x, counts = torch.randn(9, 24).bfloat16(), torch.tensor([4, 0, 5])
    expected = plain.run(x, counts, ACTIVATIONS["silu"])
    torch.testing.assert_close(fast.run(x, counts, ACTIVATIONS["silu"]), expected, atol=0.03, rtol=0.02)


def test_only_bfloat16_on_a_cpu_is_packed() -> None:
    assert not can_pack(torch.empty(1))
    plain = LayerExperts((0,), torch.zeros(1, 8, 4), torch.zeros(1, 4, 4))
    assert plain.packed(ACTIVATIONS["silu"]) is plain
