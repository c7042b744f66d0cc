"""The native kernels against float32 torch on the same numbers, with every instruction set that this CPU has."""

import os
import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from actors.experts.layer_experts import FusedExperts, LayerExperts
from actors.kernels import native
from actors.kernels.native import NativeExperts, NativeLinear
from actors.packed import Int8Linear

NAMES = ("avx2", "avx512_bf16", "amx_bf16")
# Fewer where each takes long: test_native_checked.py.
EXAMPLES = int(os.environ.get("NATIVE_EXAMPLES", "60"))
sizes = st.sampled_from([1, 2, 15, 16, 17, 31, 32, 33, 64, 100])


@pytest.fixture(params=NAMES, scope="module")
def isa(request: pytest.FixtureRequest) -> int:
    if native.library() is None:
        pytest.skip(native.why_not_loaded())
    if request.param not in native.instruction_sets():
        pytest.skip(f"this CPU has no {request.param}")
    return native.instruction_sets()[request.param]


@pytest.mark.needs("g++")
def test_the_kernels_have_been_built_with_the_package() -> None:
    """A build that fails silently must not go unnoticed."""
    assert native.library() is not None, native.why_not_loaded()
    assert set(native.instruction_sets()) <= set(NAMES)


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """As close as the rounding of the result, and of what lies between two products, allows."""
    scale = float(expected.abs().max()) if expected.numel() else 1.0
    torch.testing.assert_close(actual.float(), expected, atol=0.01 * scale + 1e-6, rtol=0.01)


@given(num_tokens=st.integers(0, 70), width=sizes, outputs=sizes, has_bias=st.booleans(), offset=st.integers(0, 3))
@settings(max_examples=EXAMPLES, deadline=None)
@pytest.mark.parametrize("threads", [1, 3])
def test_linear(isa: int, threads: int, num_tokens: int, width: int, outputs: int, has_bias: bool, offset: int) -> None:
    weight, bias = numbers(0, outputs, width) / width**0.5, numbers(1, outputs) if has_bias else None
    x = numbers(2, num_tokens * width + offset)[offset:].view(num_tokens, width)  # not aligned, with an offset
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        actual = NativeLinear(native.pack(weight), outputs, bias, isa)(x)
    finally:
        torch.set_num_threads(before)
    assert_close(actual, F.linear(x.float(), weight.float(), None if bias is None else bias.float()))


def plain_experts(gate_up: Tensor, down: Tensor, x: Tensor, rows: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    """What is expected, and the sum of what is added up without its signs: roundings are in proportion to that."""
    out, magnitude = torch.zeros(x.shape), torch.zeros(x.shape)
    for expert in range(len(down)):
        tokens, choices = (rows == expert).nonzero(as_tuple=True)
        gate, up = (x[tokens].float() @ gate_up[expert].float().T).chunk(2, dim=1)
        h, down_DF, gates_T1 = F.silu(gate) * up, down[expert].float(), gates[tokens, choices, None].float()
        out.index_add_(0, tokens, h @ down_DF.T * gates_T1)
        magnitude.index_add_(0, tokens, h.abs() @ down_DF.abs().T * gates_T1.abs())
    return out, magnitude


@given(data=st.data(), num_tokens=st.integers(0, 40), hidden=sizes, width=sizes, num_experts=st.integers(1, 5))
@settings(max_examples=EXAMPLES, deadline=None)
def test_experts(isa: int, data: st.DataObject, num_tokens: int, hidden: int, width: int, num_experts: int) -> None:
    """Experts without tokens, tokens without experts, sizes that are no multiple of a tile."""
    top_k = data.draw(st.integers(1, 4))
    row = st.integers(0, num_experts)  # num_experts: computed elsewhere
    rows = data.draw(st.lists(row, min_size=num_tokens * top_k, max_size=num_tokens * top_k))
    rows_TK = torch.tensor(rows, dtype=torch.int64).view(num_tokens, top_k)
    gate_up, down = numbers(0, num_experts, 2 * width, hidden), numbers(1, num_experts, hidden, width)
    gate_up, down = gate_up / hidden**0.5, down / width**0.5
    x, gates = numbers(2, num_tokens, hidden), numbers(3, num_tokens, top_k).abs()
    experts = NativeExperts.of(gate_up, down, isa)
    expected, magnitude = plain_experts(gate_up, down, x, rows_TK, gates)
    assert ((experts.run(x, rows_TK, gates).float() - expected).abs() <= 0.01 * magnitude + 1e-6).all()


def int8_experts(gate_up: Tensor, down: Tensor, x: Tensor, rows: Tensor, gates: Tensor) -> Tensor:
    """The same with int8 experts in torch. What lies between the two products stays float32, as in the kernels."""
    out = torch.zeros(x.shape)
    for expert in range(len(down)):
        tokens, choices = (rows == expert).nonzero(as_tuple=True)
        gate, up = Int8Linear.of(gate_up[expert])(x[tokens].float()).chunk(2, dim=1)
        y = Int8Linear.of(down[expert])(F.silu(gate) * up)
        out.index_add_(0, tokens, y * gates[tokens, choices, None].float())
    return out


@given(num_tokens=st.integers(0, 40), hidden=sizes, width=sizes, num_experts=st.integers(1, 5), seed=st.integers(0, 99))
@settings(max_examples=EXAMPLES, deadline=None)
def test_int8_experts(isa: int, num_tokens: int, hidden: int, width: int, num_experts: int, seed: int) -> None:
    rows = torch.randint(num_experts + 1, (num_tokens, 2), generator=torch.Generator().manual_seed(seed))
    gate_up, down = numbers(0, num_experts, 2 * width, hidden), numbers(1, num_experts, hidden, width)
    gate_up, down = gate_up / hidden**0.5, down / width**0.5
    x, gates = numbers(2, num_tokens, hidden), numbers(3, num_tokens, 2).abs()
    experts = NativeExperts.of(gate_up, down, isa, is_int8=True)
    assert_close(experts.run(x, rows, gates), int8_experts(gate_up, down, x, rows, gates))


@pytest.mark.parametrize("is_int8", [False, True])
def test_a_token_is_computed_alike_whatever_is_computed_with_it(isa: int, is_int8: bool) -> None:
    experts = NativeExperts.of(numbers(0, 4, 96, 64) / 8, numbers(1, 4, 64, 48) / 7, isa, is_int8)
    x, gates = numbers(2, 50, 64), numbers(3, 50, 2).abs()
    rows = torch.stack([torch.randperm(4, generator=torch.Generator().manual_seed(i))[:2] for i in range(50)])
    together = experts.run(x, rows, gates)
    alone = torch.cat([experts.run(x[i : i + 1], rows[i : i + 1], gates[i : i + 1]) for i in range(50)])
    assert together.equal(alone)


def test_extreme_numbers(isa: int) -> None:
    """silu neither overflows nor underflows to NaN; what is not a number stays so."""
    eye = torch.eye(16).bfloat16()[None]
    experts = NativeExperts.of(torch.cat([eye, eye], dim=1), eye, isa)
    x = torch.zeros(1, 16).bfloat16()
    x[0, :6] = torch.tensor([300.0, -300.0, 1e19, -1e19, 1e-30, 88.5])
    one = torch.ones(1, 1).bfloat16()
    actual = experts.run(x, torch.zeros(1, 1, dtype=torch.int64), one)
    torch.testing.assert_close(actual.float(), F.silu(x.float()) * x.float(), rtol=0.01, atol=1e-30)
    x[0, 3] = float("nan")
    assert experts.run(x, torch.zeros(1, 1, dtype=torch.int64), one).isnan().all(), "0 * NaN is NaN, as everywhere"


def test_int8_hides_nothing_that_is_not_finite(isa: int) -> None:
    """Nor does a row of zeros, or of numbers next to zero, become one."""
    experts = NativeExperts.of(numbers(0, 1, 64, 32) / 6, numbers(1, 1, 32, 32) / 6, isa, is_int8=True)
    x = torch.zeros(5, 32).bfloat16()
    x[1, 3], x[2, 5], x[3] = float("nan"), -float("inf"), 1e-38
    actual = experts.run(x, torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1).bfloat16())
    assert actual[1:3].isnan().all()
    assert actual[[0, 3, 4]].equal(torch.zeros(3, 32).bfloat16())


def test_several_threads_may_call_at_once(isa: int) -> None:
    linear = NativeLinear(native.pack(numbers(0, 512, 256) / 16), 512, None, isa)  # 8 shares of four tiles
    x = numbers(1, 9, 256)
    expected, wrong = linear(x), []

    def call() -> None:
        wrong.extend(1 for _ in range(200) if not linear(x).equal(expected))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize("is_int8", [False, True])
def test_regrouping_keeps_what_experts_compute(isa: int, is_int8: bool) -> None:
    gate_up, down = numbers(0, 6, 64, 32) / 6, numbers(1, 6, 32, 32) / 6

    def layer(*ids: int) -> LayerExperts:
        return LayerExperts(ids, gate_up[list(ids)], down[list(ids)])

    def fused(*ids: int) -> FusedExperts:
        return FusedExperts(ids, NativeExperts.of(gate_up[list(ids)], down[list(ids)], isa, is_int8))

    x, gates = numbers(2, 5, 32), numbers(3, 5, 2)
    regrouped = fused(0, 1, 2).regrouped((1, 4), layer(4))
    assert regrouped.ids == (1, 4)
    by_4_and_1 = regrouped.experts.run(x, torch.tensor([[1, 0]]).expand(5, 2), gates)
    assert by_4_and_1.equal(fused(4, 1).experts.run(x, torch.tensor([[0, 1]]).expand(5, 2), gates))
