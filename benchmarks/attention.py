"""Attention of a decode step in one layer, over the paged cache: the native kernel beside torch, which gathers first.

    python -m benchmarks.attention [--threads 2]

Shape of 1b-a400m: 16 query heads, 8 key/value heads of 64, bfloat16. Medians; the two take turns.
"""

import os
import statistics
import time
from typing import Any

os.environ["OMP_WAIT_POLICY"] = "passive"

import torch
import typer

from actors.kernels import packed
from actors.model.attention import plan_attention
from actors.model.batch import Span, StepBatch
from actors.model.paged_kv import PagedKV
from benchmarks.make_checkpoint import SHAPES
from benchmarks.report import table
from cluster.model_config import GraniteMoeConfig

CONFIG = GraniteMoeConfig.model_validate(SHAPES["1b-a400m"] | {"num_hidden_layers": 1})
BLOCK_SIZE = 16


def main(threads: int = os.cpu_count() or 1, rounds: int = 15) -> None:
    """Measure the attention of one layer."""
    torch.set_num_threads(threads)
    rows = [_measure(batch, context, rounds) for batch in (1, 8, 32) for context in (128, 1024)]
    table(("sequences", "context", "torch, ms", "native, ms", "torch / native"), rows)


def _measure(batch: int, context: int, rounds: int) -> tuple[str, ...]:
    blocks_each = -(-context // BLOCK_SIZE)
    kv = PagedKV(CONFIG, batch * blocks_each, BLOCK_SIZE, torch.device("cpu"), torch.bfloat16)
    kv.k_LBSGC.normal_()
    kv.v_LBSGC.normal_()
    blocks = torch.randperm(batch * blocks_each, dtype=torch.int32).view(batch, blocks_each)
    nothing = torch.empty(batch, dtype=torch.int64)
    spans = tuple(Span(i, 1, context) for i in range(batch))
    step = StepBatch(nothing, nothing, nothing, blocks, nothing, spans)
    q = torch.randn(batch, CONFIG.num_attention_heads, CONFIG.head_dim).bfloat16()
    choices: tuple[Any, ...] = ("torch", "native")
    plans = {}
    for choice in choices:
        packed.Kernels.choose(choice)
        plans[choice] = plan_attention(step, kv)
    seconds: dict[str, list[float]] = {choice: [] for choice in choices}
    for _ in range(rounds):
        for choice, plan in plans.items():
            started = time.perf_counter()
            plan.attend(q, kv.k_LBSGC[0], kv.v_LBSGC[0], CONFIG.attention_multiplier)
            seconds[choice].append(time.perf_counter() - started)
    plain, native = (statistics.median(seconds[choice]) for choice in choices)
    return str(batch), str(context), f"{1e3 * plain:.2f}", f"{1e3 * native:.2f}", f"{plain / native:.1f}"


if __name__ == "__main__":
    typer.run(main)
