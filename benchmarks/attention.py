"""Attention in one layer, over the paged cache: the native kernel beside torch, which gathers first.

    python -m benchmarks.attention [--threads 2]

A decode step of some sequences, and chunks of a prompt. Shape of 1b-a400m: 16 query heads, 8 key/value heads of 64,
bfloat16. Medians; the two take turns.
"""

import os
import statistics
import time

os.environ["OMP_WAIT_POLICY"] = "passive"

import torch
import typer

from actors.compute import Compute
from actors.kernels.front_layer import NativeBatch, attend
from actors.kernels.native import fastest
from actors.model.attention import AttentionRule, GatherPlan
from actors.model.batch import Span, StepBatch
from actors.model.paged_kv import PagedKV
from benchmarks.make_checkpoint import SHAPES
from benchmarks.report import table
from cluster.models.family import parse_config

SPEC = parse_config(SHAPES["1b-a400m"] | {"num_hidden_layers": 1})
BLOCK_SIZE = 16


def main(threads: int = os.cpu_count() or 1, rounds: int = 15) -> None:
    """Measure the attention of one layer."""
    torch.set_num_threads(threads)
    decodes = [_measure([(1, context)] * batch, rounds) for batch in (1, 8, 32) for context in (128, 1024)]
    chunks = [_measure([(512, context)], rounds) for context in (512, 2048)]
    table(("sequences", "new tokens", "context", "torch, ms", "native, ms", "torch / native"), decodes + chunks)


def _measure(lengths: list[tuple[int, int]], rounds: int) -> tuple[str, ...]:
    """Sequences of (new tokens, context)."""
    new, context = lengths[0]
    blocks_each = -(-context // BLOCK_SIZE)
    kv = PagedKV(SPEC, len(lengths) * blocks_each, BLOCK_SIZE, Compute.choose("cpu", "bfloat16"))
    kv.k_LBSGC.normal_()
    kv.v_LBSGC.normal_()
    k_BSGC, v_BSGC = kv.k_LBSGC[0], kv.v_LBSGC[0]
    blocks = torch.randperm(len(lengths) * blocks_each, dtype=torch.int32).view(len(lengths), -1)
    starts = torch.arange(len(lengths) + 1) * new
    nothing = torch.empty(int(starts[-1]), dtype=torch.int64)
    spans = tuple(Span(i * new, new, context) for i in range(len(lengths)))
    plan = GatherPlan(StepBatch(nothing, nothing, nothing, blocks, nothing, spans), kv)
    contexts, angles = torch.tensor([context for _, context in lengths]), None
    batch = NativeBatch(nothing, starts, contexts, blocks, angles, BLOCK_SIZE)
    q = torch.randn(len(nothing), SPEC.num_heads, SPEC.head_dim).bfloat16()
    scale, isa, wide_q = SPEC.attention_scale, fastest(), q.float()
    choices = {
        "torch": lambda: plan.attend(q, k_BSGC, v_BSGC, AttentionRule(scale)),
        "native": lambda: attend(batch, wide_q, k_BSGC, v_BSGC, scale, isa),
    }
    seconds: dict[str, list[float]] = {choice: [] for choice in choices}
    for _ in range(rounds):
        for choice, run in choices.items():
            started = time.perf_counter()
            run()
            seconds[choice].append(time.perf_counter() - started)
    plain, native = (statistics.median(seconds[choice]) for choice in choices)
    sizes = str(len(lengths)), str(new), str(context)
    return *sizes, f"{1e3 * plain:.2f}", f"{1e3 * native:.2f}", f"{plain / native:.1f}"


if __name__ == "__main__":
    typer.run(main)
