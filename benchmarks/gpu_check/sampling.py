"""Router and sampler, each against the same on the CPU, row by row.

Shapes: T tokens, R rows, D hidden, E experts, K top-k, V vocabulary.
"""

from typing import Any

import torch

from actors.engine.sampler import sample
from actors.engine.sequence import Sequence
from actors.model.layers import Linear
from actors.model.routing import route
from benchmarks.gpu_check.check import Check, Trial
from cluster.messages.requests import GenerationRequest, SamplingParams
from cluster.models.spec import RouterRule

# Logits that are closer than this are a tie: which one is larger depends on how sums are rounded.
TIE = {torch.float32: 1e-4, torch.bfloat16: 0.13}
GATES_OFF = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
TOKENS, VOCABULARY = 256, 8192
RULES: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.7},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 0.9, "top_p": 0.9},
    {"temperature": 1.3, "top_p": 0.999, "min_p": 0.001},
    {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.2},
    {"temperature": 0.8, "logit_bias": ((3, 4.0), (77, -5.0))},
    {"temperature": 0.0, "min_tokens": 99, "stop_token_ids": (5,)},
)


def router(trial: Trial) -> None:
    sizes, generator = trial.sizes, torch.Generator().manual_seed(0)
    top_k = min(8, sizes.experts // 2)
    for dtype in (torch.float32, torch.bfloat16):
        x_TD = torch.randn(TOKENS, sizes.hidden, generator=generator).to(dtype)
        weight_ED = (2 * torch.randn(sizes.experts, sizes.hidden, generator=generator) / sizes.hidden**0.5).to(dtype)
        logits_TE = x_TD.float() @ weight_ED.float().T
        ids_TK, gates_TK = (
            each.cpu() for each in route(x_TD.to(trial.device), Linear(weight_ED.to(trial.device)), top_k, RouterRule())
        )
        top_TK, expected_TK = logits_TE.topk(top_k)
        distance_TK = (logits_TE.gather(1, ids_TK) - top_TK).abs()
        name = str(dtype).removeprefix("torch.")
        trial.figures[f"ties, {name}"] = int((ids_TK != expected_TK).any(1).sum())
        worst = float(distance_TK.max())
        trial.expect(worst <= TIE[dtype], f"{name}: an expert is chosen whose logit is lower by {worst:.2g}")
        error = float((gates_TK.float() - logits_TE.gather(1, ids_TK).softmax(-1)).abs().max())
        trial.expect(error <= GATES_OFF[dtype], f"{name}: gates are off by {error:.2g}")


def sampler(trial: Trial) -> None:
    """Each row alone on the CPU is what it is to be in a batch on the device."""
    logits_RV = 3 * torch.randn(8 * len(RULES), VOCABULARY, generator=torch.Generator().manual_seed(0))
    batched = sample(logits_RV.to(trial.device), [_sequence(row) for row in range(len(logits_RV))])
    alone = [sample(logits_RV[row : row + 1], [_sequence(row)])[0] for row in range(len(logits_RV))]
    other = [row for row, (ours, theirs) in enumerate(zip(batched, alone, strict=True)) if ours != theirs]
    trial.figures |= {"rows": len(alone), "other tokens": len(other)}
    trial.expect(not other, f"rows with rules {sorted({row % len(RULES) for row in other})} get other tokens")


def _sequence(row: int) -> Sequence:
    params = SamplingParams(max_tokens=200, seed=row, **RULES[row % len(RULES)])
    sequence = Sequence.of(GenerationRequest(str(row), "", (1, 2, 3 + row), params))
    sequence.token_ids += [7, 8 + row, 7]
    return sequence


CHECKS = (
    Check("router", "the same experts and gates as in float32 on the CPU; ties are counted", router),
    Check("sampler", "a row's token does not depend on the device or on the other rows", sampler),
)
