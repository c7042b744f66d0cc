"""Speeds of a front's matrices and of experts, by rows: bytes of weights that pass in a second. bfloat16.

More weights than caches hold are gone through in each pass, as a step does.
"""

from collections.abc import Iterator

import torch

from actors.activations import ACTIVATIONS
from actors.compute import Compute
from actors.experts.layer_experts import LayerExperts
from actors.experts.store import ExpertStore
from actors.packed import pack
from actors.probe.stopwatch import usual_seconds
from cluster.models.spec import ModelSpec
from cluster.planning.cost import expert_weights
from cluster.planning.hardware import Speed

WIDTH, NUM_MATRICES = 1024, 128  # 256 MiB
ROWS = (1, 4, 16, 64, 256)
TOKENS = (1, 4, 16, 64, 256, 512)
NUM_LAYERS = 3


def linear_speeds(compute: Compute, budget_s: float) -> Iterator[Speed]:
    """As packed linear layers compute."""
    matrices = [
        pack(torch.randn(2 * WIDTH, WIDTH).bfloat16(), None, compute.linears, compute.isa)
        for _ in range(NUM_MATRICES // 2)
    ]
    num_bytes = NUM_MATRICES * WIDTH * WIDTH * 2
    for rows in ROWS:
        x_TD = torch.randn(rows, WIDTH).bfloat16()

        def layers(x_TD: torch.Tensor = x_TD) -> None:
            for matrix in matrices:
                matrix(x_TD)

        seconds = usual_seconds(layers, budget_s / len(ROWS))
        yield Speed(rows=rows, gb_per_second=num_bytes / seconds / 1e9)


def expert_speeds(spec: ModelSpec, compute: Compute, budget_s: float) -> Iterator[Speed]:
    """As a store of such experts computes tokens that choose at random. Rows: of each expert that has some."""
    torch.manual_seed(0)
    store = _store(spec, compute)
    for tokens in TOKENS:
        x_TD = torch.randn(tokens, spec.hidden_size).bfloat16()
        ids_TK = torch.rand(tokens, spec.num_experts).argsort(1)[:, : spec.top_k].contiguous()
        gates_TK = torch.full((tokens, spec.top_k), 1 / spec.top_k).bfloat16()
        touched = ids_TK.unique().numel()

        def layers(x_TD: torch.Tensor = x_TD, ids_TK: torch.Tensor = ids_TK, gates: torch.Tensor = gates_TK) -> None:
            for layer in range(NUM_LAYERS):
                store.run(layer, x_TD, ids_TK, gates)

        seconds = usual_seconds(layers, budget_s / len(TOKENS)) / NUM_LAYERS
        yield Speed(
            rows=tokens * spec.top_k / touched, gb_per_second=2 * touched * expert_weights(spec) / seconds / 1e9
        )


def _store(spec: ModelSpec, compute: Compute) -> ExpertStore:
    E, D, F = spec.num_experts, spec.hidden_size, spec.expert_size
    activation = ACTIVATIONS[spec.activation]

    def layer() -> LayerExperts:
        gate_up = torch.randn(E, 2 * F, D).div_(D**0.5).bfloat16()
        return LayerExperts(tuple(range(E)), gate_up, torch.randn(E, D, F).div_(F**0.5).bfloat16())

    return ExpertStore(spec, tuple(layer().packed(compute, activation) for _ in range(NUM_LAYERS)), compute)
