"""A layer's experts: our kernels beside torch, and how far they are from what the machine can do at all.

    python -m benchmarks.kernels [--threads 2]

Shape of 1b-a400m: 32 experts of width 512, hidden 1024, top-8 of random routing, random bfloat16 weights. The limits
are measured in the same run: a plain parallel read of as many bytes, a large float32 product. Medians; all take turns.
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

os.environ["OMP_WAIT_POLICY"] = "passive"

import torch
import typer

from actors.kernels import native, packed
from actors.model.expert_half import ACTIVATIONS, ExpertStore, LayerExperts
from benchmarks.report import environment, table
from cluster.model_config import GraniteMoeConfig

EXPERTS, HIDDEN, WIDTH, TOP_K = 32, 1024, 512, 8
MATMUL = 2048


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
    figures = [figure for n in map(int, tokens.split(",")) for figure in _measure(stores, n, threads, rounds)]
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
        content = {"environment": environment(), "threads": threads, "figures": [asdict(f) for f in figures]}
        out.write_text(json.dumps(content, indent=1) + "\n")


def _store(plain: LayerExperts, choice: Any) -> ExpertStore:
    packed.Kernels.choose(choice)
    config = GraniteMoeConfig.model_construct(num_local_experts=EXPERTS, hidden_act="silu")
    return ExpertStore(config, (plain.packed(ACTIVATIONS["silu"]),))


def _measure(stores: dict[str, ExpertStore], num_tokens: int, threads: int, rounds: int) -> list[Figure]:
    x = torch.randn(num_tokens, HIDDEN).bfloat16()
    ids = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(num_tokens)])
    gates = torch.full((num_tokens, TOP_K), 1 / TOP_K).bfloat16()
    num_bytes = ids.unique().numel() * 3 * HIDDEN * WIDTH * 2
    flops = num_tokens * TOP_K * 6 * HIDDEN * WIDTH
    square = torch.randn(MATMUL, MATMUL)
    lib = native.library()
    runs: dict[str, Callable[[], object]] = {"product": lambda: square @ square}
    read_bytes = EXPERTS * 3 * HIDDEN * WIDTH * 2
    if lib:
        memory = native.memory(read_bytes).zero_()
        runs["read"] = lambda: lib.outcrop_read(threads, memory.data_ptr(), read_bytes)
    runs |= {name: lambda store=store: store.run(0, x, ids, gates) for name, store in stores.items()}  # type: ignore[misc]
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    read = read_bytes / medians["read"] if "read" in medians else float("nan")
    product = 2 * MATMUL**3 / medians["product"]
    return [
        Figure(
            name, num_tokens, 1e3 * s, num_bytes / s / 1e9, flops / s / 1e9, num_bytes / s / read, flops / s / product
        )
        for name, s in ((name, medians[name]) for name in stores)
    ]


if __name__ == "__main__":
    typer.run(main)
