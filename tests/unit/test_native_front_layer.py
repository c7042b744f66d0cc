"""The front's half of a layer in one native call, against the same half in float32 torch on the same numbers."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from actors.compute import Compute
from actors.kernels import native
from actors.kernels.native import NativeLinear
from actors.model.attention import GatherPlan
from actors.model.batch import Span, StepBatch
from actors.model.front_layers import LayerWeights, NativeLayers, TorchLayers, native_layers
from actors.model.layers import Linear
from actors.model.paged_kv import PagedKV
from actors.model.rope import Angles, Rotary
from cluster.models.spec import LayerSpec, ModelSpec, RouterRule
from tests.specs import CPU, PLAIN, PLAIN_BFLOAT16, spec_of
from tests.unit.test_native import EXAMPLES, isa, numbers  # noqa: F401 - a fixture

BLOCK_SIZE = 4


def config(hidden: int = 48, num_q: int = 4, num_kv: int = 2, head_dim: int = 16, experts: int = 8, top_k: int = 3):
    return spec_of(
        {
            "vocab_size": 10,
            "hidden_size": hidden,
            "head_dim": head_dim,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": num_q,
            "num_key_value_heads": num_kv,
            "num_local_experts": experts,
            "num_experts_per_tok": top_k,
            "attention_multiplier": 1 / math.sqrt(head_dim),
            "residual_multiplier": 0.22,
            "rms_norm_eps": 0.1,
        }
    )


# What a model may be beside that. A layer attends to all tokens or in a window, and encodes positions or does not.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "head norms, all gates": {"qk_norm": "head", "router": RouterRule("all", is_normalised=True)},
    "projection norms, clipped": {"qk_norm": "projection", "clip_qkv": 0.7, "router": RouterRule("all", False)},
    "sinks in a window": {"has_sinks": True, "layers": (LayerSpec(window=9, rope_theta=1e4),)},
    "no positions": {"has_sinks": True, "layers": (LayerSpec(window=100, rope_theta=None),)},
    "no experts": {"layers": (LayerSpec(has_experts=False),)},
}


def weights_of(cfg: ModelSpec, *, has_bias: bool = False) -> LayerWeights:
    def linear(seed: int, outputs: int, inputs: int, *, has_bias: bool) -> Linear:
        return Linear(numbers(seed, outputs, inputs) / inputs**0.5, numbers(seed + 1, outputs) if has_bias else None)

    hidden, queries, keys = cfg.hidden_size, cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    widths = {"none": None, "head": (cfg.head_dim,) * 2, "projection": (queries, keys)}[cfg.qk_norm]
    q_norm, k_norm = ((1 + numbers(7 + i, n) / 4) for i, n in enumerate(widths)) if widths else (None, None)
    return LayerWeights(
        1 + numbers(0, hidden) / 4,
        linear(1, queries + 2 * cfg.num_kv_heads * cfg.head_dim, hidden, has_bias=has_bias),
        linear(3, hidden, queries, has_bias=has_bias),
        1 + numbers(5, hidden) / 4,
        linear(6, cfg.num_experts, hidden, has_bias=False) if cfg.layers[0].has_experts else None,
        q_norm=q_norm,
        k_norm=k_norm,
        sinks_H=numbers(9, cfg.num_heads) if cfg.has_sinks else None,
    )


def packed(weights: LayerWeights, isa: int) -> LayerWeights:  # noqa: F811
    def pack(linear: Linear) -> NativeLinear:
        return NativeLinear(native.pack(linear.weight_OD), linear.weight_OD.shape[0], linear.bias_O, isa)

    router = weights.router and pack(weights.router)
    return replace(weights, qkv=pack(weights.qkv), out=pack(weights.out), router=router)


def widened(weights: LayerWeights) -> LayerWeights:
    def widen(linear: Linear) -> Linear:
        return Linear(linear.weight_OD.float(), None if linear.bias_O is None else linear.bias_O.float())

    def vector(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.float()

    return LayerWeights(
        weights.attention_norm_D.float(),
        widen(weights.qkv),
        widen(weights.out),
        weights.moe_norm_D.float(),
        weights.router and widen(weights.router),
        q_norm=vector(weights.q_norm),
        k_norm=vector(weights.k_norm),
        sinks_H=vector(weights.sinks_H),
    )


def batch_of(lengths: list[tuple[int, int]]) -> StepBatch:
    """Sequences of (new, cached) tokens; each has blocks of its own, in disorder."""
    spans, positions, slots, start = [], [], [], 0
    width = max(-(-(new + cached) // BLOCK_SIZE) for new, cached in lengths)
    blocks = torch.randperm(len(lengths) * width, generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    blocks = blocks.view(len(lengths), width)
    for row, (new, cached) in enumerate(lengths):
        spans.append(Span(start, new, cached + new))
        start += new
        positions += range(cached, cached + new)
        slots += [
            int(blocks[row, at // BLOCK_SIZE]) * BLOCK_SIZE + at % BLOCK_SIZE for at in range(cached, cached + new)
        ]
    nothing = torch.zeros(start, dtype=torch.int64)
    return StepBatch(nothing, torch.tensor(positions), torch.tensor(slots), blocks, nothing, tuple(spans))


class Case:
    """One layer of a step, that can be computed by both."""

    def __init__(self, cfg: ModelSpec, weights: LayerWeights, lengths: list[tuple[int, int]]) -> None:
        self.cfg, self.weights, self.batch = cfg, weights, batch_of(lengths)
        self.x_TD = numbers(10, self.batch.num_tokens, cfg.hidden_size)
        self.combined_TD = numbers(11, self.batch.num_tokens, cfg.hidden_size)
        # Rounded for both: positions are not what is compared.
        of_positions = Rotary(cfg, CPU).angles(self.batch.positions_T, torch.bfloat16)
        self.angles: Angles = {None: None, cfg.rope.rope_theta: of_positions}
        self.cached = numbers(12, 2, 1, *self._cache(PLAIN_BFLOAT16).k_LBSGC.shape[1:])

    def _cache(self, compute: Compute) -> PagedKV:
        return PagedKV(self.cfg, self.batch.blocks_SB.numel(), BLOCK_SIZE, compute)

    def _filled(self, compute: Compute) -> PagedKV:
        kv = self._cache(compute)
        kv.k_LBSGC.copy_(self.cached[0])
        kv.v_LBSGC.copy_(self.cached[1])
        return kv

    def native(self, isa: int, combined_TD: Tensor | None) -> tuple[NativeLayers, tuple[Tensor, ...]]:  # noqa: F811
        layers = native_layers(self.cfg, (packed(self.weights, isa),))
        assert layers is not None
        steps = NativeLayers(self.cfg, layers, self.x_TD.clone(), self.angles, self.batch, self._filled(PLAIN_BFLOAT16))
        return steps, steps.attend_and_route(0, combined_TD)

    def torch(self, combined_TD: Tensor | None) -> tuple[TorchLayers, tuple[Tensor, ...]]:
        layers = (widened(self.weights),)
        angles = {base: of and (of[0].float(), of[1].float()) for base, of in self.angles.items()}
        kv = self._filled(PLAIN)
        steps = TorchLayers(self.cfg, layers, self.x_TD.float(), angles, self.batch, kv, GatherPlan(self.batch, kv))
        return steps, steps.attend_and_route(0, None if combined_TD is None else combined_TD.float())


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """To within a few roundings to bfloat16, of 1/256 each."""
    torch.testing.assert_close(actual.float(), expected, atol=0.02 * float(expected.abs().max()), rtol=0.02)


@given(
    chunks=st.lists(st.tuples(st.integers(2, 40), st.integers(0, 30)), min_size=1, max_size=3),
    num_single=st.integers(0, 3),
    hidden=st.sampled_from([8, 30, 64]),
    num_kv=st.integers(1, 2),
    shared=st.integers(1, 3),
    head_dim=st.sampled_from([8, 24, 64]),
    experts=st.integers(1, 20),
    has_bias=st.booleans(),
    is_first=st.booleans(),
    variant=st.sampled_from(sorted(VARIANTS)),
)
@settings(max_examples=EXAMPLES, deadline=None)
def test_one_call_is_the_front_half_of_a_layer(
    isa: int,  # noqa: F811
    chunks: list[tuple[int, int]],
    num_single: int,
    hidden: int,
    num_kv: int,
    shared: int,
    head_dim: int,
    experts: int,
    has_bias: bool,
    is_first: bool,
    variant: str,
) -> None:
    cfg = replace(config(hidden, num_kv * shared, num_kv, head_dim, experts, min(3, experts)), **VARIANTS[variant])
    case = Case(cfg, weights_of(cfg, has_bias=has_bias), [(1, cached) for _, cached in chunks[:num_single]] + chunks)
    combined_TD = None if is_first else case.combined_TD
    actual, (h_TD, ids_TK, gates_TK) = case.native(isa, combined_TD)
    expected, (expected_h_TD, expected_ids_TK, expected_gates_TK) = case.torch(combined_TD)
    assert_close(actual.x_TD, expected.x_TD)
    assert_close(h_TD, expected_h_TD)
    assert_close(actual.kv.k_LBSGC, expected.kv.k_LBSGC)
    assert_close(actual.kv.v_LBSGC, expected.kv.v_LBSGC)
    if not cfg.layers[0].has_experts:
        assert (ids_TK, gates_TK, expected_ids_TK) == (None, None, None)
        return
    # Experts of nearly equal logits may change places: their own logits tell.
    logits_TE = expected_h_TD @ case.weights.router.weight_OD.float().T
    assert_close(logits_TE.gather(1, ids_TK), logits_TE.gather(1, expected_ids_TK))
    assert all(len(set(ids)) == len(ids) for ids in ids_TK.tolist())
    assert_close(gates_TK, expected_gates_TK)


def test_equal_logits_are_taken_in_order_and_nan_stays_within_bounds(isa: int) -> None:  # noqa: F811
    cfg = config()
    weights = weights_of(cfg)
    weights = replace(weights, router=Linear(torch.zeros_like(weights.router.weight_OD)))
    case = Case(cfg, weights, [(1, 0), (1, 0)])
    case.x_TD[1] = math.nan
    _, (_, ids_TK, gates_TK) = case.native(isa, None)
    assert ids_TK.tolist() == [[0, 1, 2], [0, 1, 2]]
    torch.testing.assert_close(gates_TK[0].float(), torch.full((3,), 1 / 3), atol=1e-3, rtol=0)
    assert gates_TK[1].isnan().all()


def test_the_step_of_a_token_is_the_same_in_any_company(isa: int) -> None:  # noqa: F811
    cfg = config()
    weights = weights_of(cfg)
    lengths = [(1, 20), (1, 0), (1, 7), (5, 3)]
    together, (h_TD, ids_TK, gates_TK) = Case(cfg, weights, lengths).native(isa, None)
    first = Case(cfg, weights, lengths)
    first.batch = replace(
        first.batch,
        slots_T=first.batch.slots_T[:1],
        positions_T=first.batch.positions_T[:1],
        token_ids_T=first.batch.token_ids_T[:1],
        blocks_SB=first.batch.blocks_SB[:1],
        spans=first.batch.spans[:1],
    )
    first.x_TD = first.x_TD[:1]
    first.angles = {base: of and (of[0][:1], of[1][:1]) for base, of in first.angles.items()}
    layers = native_layers(cfg, (packed(weights, isa),)) or ()
    alone = NativeLayers(cfg, layers, first.x_TD.clone(), first.angles, first.batch, together.kv)
    h_1D, ids_1K, gates_1K = alone.attend_and_route(0, None)
    assert h_1D.equal(h_TD[:1])
    assert ids_1K.equal(ids_TK[:1])
    assert gates_1K.equal(gates_TK[:1])
    assert alone.x_TD.equal(together.x_TD[:1])


def test_layers_that_are_not_all_packed_stay_in_torch() -> None:
    cfg = config()
    assert native_layers(cfg, (weights_of(cfg),)) is None
    if native.instruction_sets():
        mixed = replace(packed(weights_of(cfg), native.fastest()), router=weights_of(cfg).router)
        assert native_layers(cfg, (mixed,)) is None
        narrow = config(head_dim=12)
        assert native_layers(narrow, (packed(weights_of(narrow), native.fastest()),)) is None


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_do_not_change_a_bit(isa: int, threads: int) -> None:  # noqa: F811
    cfg = config(hidden=256, num_q=8, num_kv=4, head_dim=64)
    case = Case(cfg, weights_of(cfg), [(1, 600), (70, 30)])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        steps, routed = case.native(isa, case.combined_TD)
    finally:
        torch.set_num_threads(before)
    once, expected = case.native(isa, case.combined_TD)
    assert steps.x_TD.equal(once.x_TD)
    assert all(a.equal(b) for a, b in zip(routed, expected, strict=True))
