"""How fast an expert replica loads: `python -m benchmarks.loading CHECKPOINT [--threads 2]`.

All experts of a checkpoint are read and packed for this CPU, and the same files are read plainly beside it, in turns.
Files that were read before are in the page cache: what is measured is the way from there, unless `--cold` empties it.
"""

import os
import resource
import statistics
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from actors.compute import Compute
from actors.experts.loading import load_experts
from actors.weights import Weights
from benchmarks.report import table
from cluster.models.checkpoint import Checkpoint

GIB = 2**30
PIECE = 16 << 20


def read_plainly(files: set[Path], is_cold: bool) -> tuple[int, float]:
    """(bytes, seconds), by one thread into one buffer."""
    buffer, total = bytearray(PIECE), 0
    forget(files, is_cold)
    started = time.perf_counter()
    for path in sorted(files):
        with path.open("rb", buffering=0) as file:
            while done := file.readinto(buffer):
                total += done
    return total, time.perf_counter() - started


def load(checkpoint: Checkpoint, files: set[Path], is_cold: bool) -> tuple[int, float]:
    forget(files, is_cold)
    started = time.perf_counter()
    load_experts(Weights(checkpoint, Compute.choose("cpu", "bfloat16")), checkpoint.all_experts)
    return checkpoint.expert_bytes, time.perf_counter() - started


def forget(files: set[Path], is_cold: bool) -> None:
    """Takes the files out of the page cache."""
    for path in files if is_cold else ():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main(
    checkpoint: Path,
    threads: int = os.cpu_count() or 1,
    rounds: int = 3,
    cold: Annotated[bool, typer.Option("--cold")] = False,
) -> None:
    torch.set_num_threads(threads)
    found = Checkpoint.open(checkpoint)
    files = {info.file for info in found.tensors.values()}
    ways = {"plain read": lambda: read_plainly(files, cold), "experts, packed": lambda: load(found, files, cold)}
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            num_bytes, seconds = run()
            speeds[name].append(num_bytes / GIB / seconds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
    table(("", "GiB/s"), [(name, f"{statistics.median(found):.2f}") for name, found in speeds.items()])
    layer = found.expert_bytes / found.spec.num_expert_layers / GIB
    print(f"peak memory {peak:.2f} GiB: {found.expert_bytes / GIB:.2f} of experts; one layer has {layer:.2f}")


if __name__ == "__main__":
    typer.run(main)
