"""The experts: grouped products against the loop, and a store against what experts are defined as.

Shapes: T tokens, D hidden, F expert hidden, K top-k, E experts, P (token, choice) pairs.
"""

import torch
import torch.nn.functional as F

from actors.activations import ACTIVATIONS
from actors.compute import Compute
from actors.experts.layer_experts import LayerExperts, run_experts_grouped, run_experts_loop
from actors.experts.store import ExpertStore
from benchmarks.gpu_check.check import Check, Trial
from benchmarks.gpu_check.waits import other_waits
from benchmarks.make_checkpoint import SHAPES
from cluster.models.family import parse_config

# Values of outputs are about 0.4; two bfloat16 roundings of what is summed lie between.
TOLERANCE = 2e-2
REPEATS, TRAILING, TOP_K = 10, 24, 8


def _layer(trial: Trial) -> LayerExperts:
    sizes, generator = trial.sizes, torch.Generator().manual_seed(0)
    gate_up_EFD = torch.randn(sizes.experts, 2 * sizes.expert_size, sizes.hidden, generator=generator)
    down_EDF = torch.randn(sizes.experts, sizes.hidden, sizes.expert_size, generator=generator)
    scaled = (gate_up_EFD / sizes.hidden**0.5, down_EDF / sizes.expert_size**0.5)
    return LayerExperts(tuple(range(sizes.experts)), *(w.bfloat16().to(trial.device) for w in scaled))


def grouped(trial: Trial) -> None:
    """Every third expert has no row, one has a single row; rows behind the last end belong to nobody."""
    layer, sizes = _layer(trial), trial.sizes
    lengths = torch.full((sizes.experts,), 2 * sizes.pairs // sizes.experts)
    lengths[::3], lengths[1] = 0, 1
    ends_E = lengths.cumsum(0).to(torch.int32).to(trial.device)
    num_rows = int(ends_E[-1])
    generator = torch.Generator().manual_seed(1)
    x_PD = torch.randn(num_rows + TRAILING, sizes.hidden, generator=generator).bfloat16().to(trial.device)
    expected = run_experts_loop(layer, x_PD, ends_E, F.silu)[:num_rows].float()
    runs = [run_experts_grouped(layer, x_PD, ends_E, F.silu)[:num_rows] for _ in range(REPEATS)]
    error = float((runs[0].float() - expected).abs().max())
    trial.figures |= {"rows": num_rows, "largest error": f"{error:.1e}"}
    trial.expect(error <= TOLERANCE, f"grouped products are off by {error:.2g}")
    trial.expect(all(torch.equal(run, runs[0]) for run in runs), f"{REPEATS} runs differ in their bits")
    if trial.is_on_gpu:
        with other_waits(is_on_gpu=True) as seen:
            run_experts_grouped(layer, x_PD, ends_E, F.silu)
        waits = trial.figures["waits of one call"] = seen.total()
        trial.figures["way"] = "fused" if layer.is_grouped else "a loop over experts: no kernel for this GPU"
        fault = f"is expected to have {'a' if layer.is_grouped else 'no'} kernel for this GPU, but waits {waits} times"
        trial.expect(layer.is_grouped == (not waits), f"grouped_mm {fault}")


def store(trial: Trial) -> None:
    """Token by token in float32 is the definition; ids come on the host, as to a replica, and on the device."""
    layer, sizes = _layer(trial), trial.sizes
    spec = parse_config(
        SHAPES["1b-a400m"]
        | {"hidden_size": sizes.hidden, "intermediate_size": sizes.expert_size, "num_local_experts": sizes.experts}
    )
    experts = ExpertStore(spec, (layer,), Compute(trial.device, torch.bfloat16))
    generator, num_tokens = torch.Generator().manual_seed(2), 1 + sizes.pairs // 64
    x_TD = torch.randn(num_tokens, sizes.hidden, generator=generator).bfloat16()
    top_k = min(TOP_K, sizes.experts)
    ids_TK = torch.stack([torch.randperm(sizes.experts, generator=generator)[:top_k] for _ in range(num_tokens)])
    gates_TK = torch.rand(num_tokens, top_k, generator=generator).bfloat16()
    cut_TK = ids_TK.masked_fill(ids_TK % 5 == 0, -1)
    for what, chosen_TK, where in (
        ("ids on the host", cut_TK, "cpu"),
        ("ids on the device", ids_TK, trial.device.type),
    ):
        actual = experts.run(0, x_TD.to(where), chosen_TK.to(where), gates_TK.to(where)).cpu().float()
        error = float((actual - _defined(layer, x_TD, chosen_TK, gates_TK)).abs().max())
        trial.figures[f"largest error, {what}"] = f"{error:.1e}"
        trial.expect(error <= 2 * TOLERANCE, f"{what}: off by {error:.2g}")


def _defined(layer: LayerExperts, x_TD: torch.Tensor, ids_TK: torch.Tensor, gates_TK: torch.Tensor) -> torch.Tensor:
    gate_up_EFD, down_EDF, silu = layer.gate_up_EFD.cpu(), layer.down_EDF.cpu(), ACTIVATIONS["silu"]
    sum_TD = torch.zeros(x_TD.shape)
    for token, (x_D, ids, gates) in enumerate(zip(x_TD.float(), ids_TK.tolist(), gates_TK.tolist(), strict=True)):
        for expert, gate in zip(ids, gates, strict=True):
            if expert >= 0:
                gate_F, up_F = (gate_up_EFD[expert].float() @ x_D).chunk(2)
                sum_TD[token] += gate * (down_EDF[expert].float() @ (silu(gate_F) * up_F))
    return sum_TD


CHECKS = (
    Check(
        "grouped products", "grouped_mm computes what a loop over experts does, with the same bits each time", grouped
    ),
    Check("expert store", "gated sums of experts are what they are defined as", store),
)
