"""A layer's experts: our kernels beside torch, and how far they are from what the machine can do at all.

    python -m benchmarks.kernels [--threads 2]

Shape of 1b-a400m: 32 experts of width 512, hidden 1024, top-8 of random routing, random bfloat16 weights. The limits
are measured in the same run (limits.py): a plain parallel read, a large product. Medians; all take turns.
"""

import os
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

os.environ["OMP_WAIT_POLICY"] = "passive"

import torch
import typer

from actors.activations import ACTIVATIONS
from actors.compute import Compute
from actors.experts.layer_experts import LayerExperts
from actors.experts.store import ExpertStore
from actors.kernels import native
from actors.probe.limits import Gauge
from benchmarks.make_checkpoint import SHAPES
from benchmarks.report import save, table
from cluster.models.family import parse_config
from cluster.planning.cost import experts_cost

SPEC = parse_config(SHAPES["1b-a400m"])
EXPERTS, HIDDEN, WIDTH, TOP_K = SPEC.num_experts, SPEC.hidden_size, SPEC.expert_size, SPEC.top_k


@dataclass(frozen=True, slots=True)
class Figure:
    """`read_share`: bytes of weights per second, of a plain read's; `compute_share`: operations, of a product's."""

    kernels: str
    tokens: int
    milliseconds: float
    gb_per_second: float
    gflops: float
    read_share: float
    compute_share: float


def main(
    threads: int = os.cpu_count() or 1,
    tokens: str = "1,8,32,128,512",
    rounds: int = 7,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Measure the experts of one layer."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    gate_up = torch.randn(EXPERTS, 2 * WIDTH, HIDDEN).div_(HIDDEN**0.5).bfloat16()
    plain = LayerExperts(
        tuple(range(EXPERTS)), gate_up, torch.randn(EXPERTS, HIDDEN, WIDTH).div_(WIDTH**0.5).bfloat16()
    )
    stores = {"torch": _store(plain, "torch")}
    if native.instruction_sets():
        stores["native"] = _store(plain, "native")
    gauge = Gauge(threads)
    figures = [figure for n in map(int, tokens.split(",")) for figure in _measure(stores, n, gauge, rounds)]
    table(
        ("tokens", "kernels", "ms", "GB/s", "of a plain read", "GFLOP/s", "of a large product"),
        [
            (
                str(f.tokens), f.kernels, f"{f.milliseconds:.2f}", f"{f.gb_per_second:.1f}", f"{f.read_share:.2f}",
                f"{f.gflops:.0f}", f"{f.compute_share:.2f}",
            )
            for f in figures
        ],
    )  # fmt: skip
    if out:
        save(out, figures, threads=threads, limits=asdict(gauge.median))


def _store(plain: LayerExperts, choice: Any) -> ExpertStore:
    compute = Compute.choose("cpu", "bfloat16", choice)
    return ExpertStore(SPEC, (plain.packed(compute, ACTIVATIONS[SPEC.activation]),), compute)


def _measure(stores: dict[str, ExpertStore], num_tokens: int, gauge: Gauge, rounds: int) -> list[Figure]:
    x = torch.randn(num_tokens, HIDDEN).bfloat16()
    ids = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(num_tokens)])
    gates = torch.full((num_tokens, TOP_K), 1 / TOP_K).bfloat16()
    cost = experts_cost(SPEC, num_tokens, ids.unique().numel(), itemsize=2)
    seconds: dict[str, list[float]] = {name: [] for name in stores}
    for _ in range(rounds):
        gauge.measure()
        for name, store in stores.items():
            started = time.perf_counter()
            store.run(0, x, ids, gates)
            seconds[name].append(time.perf_counter() - started)
    limits = gauge.median
    return [
        Figure(
            name, num_tokens, 1e3 * s, cost.num_bytes / s / 1e9, cost.flops / s / 1e9,
            cost.num_bytes / s / limits.bytes_per_second, cost.flops / s / limits.flops_per_second,
        )
        for name, s in ((name, statistics.median(taken)) for name, taken in seconds.items())
    ]  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
