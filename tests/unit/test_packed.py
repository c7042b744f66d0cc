"""Packed matrices compute what the plain ones do."""

from dataclasses import replace

import pytest
import torch

from actors import compute as compute_module
from actors import packed as packed_module
from actors.activations import ACTIVATIONS
from actors.compute import Compute, Products
from actors.experts.layer_experts import LayerExperts, PackedExperts
from actors.model.layers import Linear, packed
from actors.packed import Int8Linear, pack, quantise
from tests.specs import PLAIN, PLAIN_BFLOAT16


@pytest.fixture(params=["onednn", "widened"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Products:
    """The forms that torch computes with, as far as this CPU can. tests/unit/test_native.py has our own."""
    if request.param == "onednn" and not compute_module.has_bfloat16():
        pytest.skip("this CPU or build has no oneDNN bfloat16")
    monkeypatch.setattr(packed_module, "PIECE", 256)  # several pieces even in the small matrices below
    return request.param


@pytest.fixture
def compute(products: Products) -> Compute:
    return replace(PLAIN_BFLOAT16, linears=products, experts=products)


@pytest.mark.parametrize("num_tokens", [1, 3, 64])
@pytest.mark.parametrize("has_bias", [False, True])
def test_packed_linear_is_the_plain_one(products: Products, num_tokens: int, has_bias: bool) -> None:
    weight, x = torch.randn(24, 16).bfloat16(), torch.randn(num_tokens, 16).bfloat16()
    bias = torch.randn(24).bfloat16() if has_bias else None
    torch.testing.assert_close(pack(weight, bias, products)(x), Linear(weight, bias)(x), atol=0.05, rtol=0.02)


def test_packed_experts_are_the_plain_ones(compute: Compute) -> None:
    torch.manual_seed(0)
    plain = LayerExperts((1, 4, 6), torch.randn(3, 32, 24).bfloat16() / 5, torch.randn(3, 24, 16).bfloat16() / 4)
    fast = plain.packed(compute, ACTIVATIONS["silu"])
    assert isinstance(fast, PackedExperts)
    x, ends = torch.randn(9, 24).bfloat16(), torch.tensor([4, 4, 9], dtype=torch.int32)
    expected = plain.run(x, ends, ACTIVATIONS["silu"])
    torch.testing.assert_close(fast.run(x, ends, ACTIVATIONS["silu"]), expected, atol=0.03, rtol=0.02)


def test_int8_is_as_close_as_its_steps() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 64).bfloat16()
    x[1], x[2, 0] = 0, float("inf")
    x8, scale = quantise(x)
    assert x8.abs().amax(1).tolist() == [127, 0, 0, 127, 127]
    assert scale[2].isnan()
    finite = [0, 1, 3, 4]
    assert ((x8 * scale[:, None] - x).abs() <= scale[:, None] * 0.51)[finite].all()


@pytest.mark.parametrize(
    ("num_tokens", "inner", "outputs"), [(3, 1, 2), (1, 1, 1), (2, 1, 64), (0, 8, 4), (5, 3000, 7)]
)
def test_int8_sums_are_exact(num_tokens: int, inner: int, outputs: int) -> None:
    """Also of the largest numbers, and where one of a matrix's sides is 1."""
    x8 = torch.randint(100, 128, (num_tokens, inner), generator=torch.Generator().manual_seed(0))
    x8[:, 0] = 127
    weight = torch.randint(-127, 128, (outputs, inner), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    expected = torch.from_numpy(x8.numpy() @ weight.numpy().astype("int64").T)
    actual = Int8Linear(weight, torch.ones(outputs))(x8.float())  # its scale is 1, so it is rounded to itself
    assert torch.equal(actual.double(), expected.float().double())


def test_experts_may_be_int8(compute: Compute) -> None:
    torch.manual_seed(0)
    plain = LayerExperts((1, 4), torch.randn(2, 128, 64).bfloat16() / 8, torch.randn(2, 64, 64).bfloat16() / 8)
    fast = plain.packed(replace(compute, int8_experts=True), ACTIVATIONS["silu"])
    assert isinstance(fast, PackedExperts)
    assert isinstance(fast.down_E[0], Int8Linear)
    x, ends = torch.randn(9, 64).bfloat16(), torch.tensor([4, 9], dtype=torch.int32)
    expected = plain.run(x, ends, ACTIVATIONS["silu"]).float()
    error = fast.run(x, ends, ACTIVATIONS["silu"]).float() - expected
    assert 0 < error.norm() < 0.04 * expected.norm()
    regrouped = fast.regrouped((1,), LayerExperts((), plain.gate_up_EFD[:0], plain.down_EDF[:0]))
    assert regrouped.down_E[0] is fast.down_E[0]


def test_what_torch_computes_as_it_is_is_not_packed() -> None:
    linear = Linear(torch.empty(1, 1))
    assert packed(linear, PLAIN) is linear
    plain = LayerExperts((0,), torch.zeros(1, 8, 4), torch.zeros(1, 4, 4))
    assert plain.packed(PLAIN, ACTIVATIONS["silu"]) is plain
