"""How the cost of a decode step grows: with batch, context, groups and replicas, over the zmq lane.

    python -m benchmarks.scaling CHECKPOINT [--only batch,context,groups,replicas] --out benchmarks/results/scaling.json

One thing varies, the others stay at batch 8, context 128, two groups, one replica each. Medians over a few short runs.
"""

import os
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

os.environ["OMP_WAIT_POLICY"] = "passive"

import typer

from benchmarks.cases import BUDGET, decode
from benchmarks.lanes import expert_cluster, make_engine
from benchmarks.report import save, table
from cluster.models.checkpoint import Checkpoint

VALUES = {
    "batch": (1, 2, 4, 8, 16, 32, 64),
    "context": (128, 512, 1024, 2048, 4096),
    "groups": (1, 2, 4),
    "replicas": (1, 2, 4),
}


@dataclass(frozen=True, slots=True)
class Case:
    batch: int = 8
    context: int = 128
    groups: int = 2
    replicas: int = 1


@dataclass(frozen=True, slots=True)
class Figure:
    axis: str
    value: int
    milliseconds: float
    tokens_per_second: float


def cases(axes: list[str]) -> Iterator[tuple[str, int, Case]]:
    """The longest contexts are measured with one sequence: their prompts must be computed first."""
    for axis in axes:
        for value in VALUES[axis]:
            common = {"batch": 1} if axis == "context" else {"context": 32} if axis == "batch" else {}
            yield axis, value, Case(**(common | {axis: value}))


def measure(engine: Any, case: Case, steps: int, rounds: int, context: int) -> float:
    """Seconds of a step; the longest context is a little less than the model's, to leave room for the steps."""
    tokens = min(case.context, context - steps - 8)
    return statistics.median(decode(engine, case.batch, steps, tokens) for _ in range(rounds))


def main(
    checkpoint: Path,
    only: str = ",".join(VALUES),
    steps: int = 4,
    rounds: int = 3,
    dtype: str = "bfloat16",
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Measure CHECKPOINT; each number of groups and replicas gets a cluster of its own."""
    by_cluster: dict[tuple[int, int], list[tuple[str, int, Case]]] = {}
    for axis, value, case in cases(only.split(",")):
        by_cluster.setdefault((case.groups, case.replicas), []).append((axis, value, case))
    figures = []
    for (groups, replicas), members in by_cluster.items():
        with expert_cluster(checkpoint, groups, replicas, dtype) as cluster:
            from actors.process.limits import limit_threads

            limit_threads(os.cpu_count() or 1)
            from actors.compute import Compute

            opened, compute = Checkpoint.open(checkpoint), Compute.choose("cpu", dtype)
            engine = make_engine(opened, compute, 8 * 1024, BUDGET)
            engine.dispatcher = cluster.dispatcher("zmq", engine.metrics)
            for axis, value, case in members:
                seconds = measure(engine, case, steps, rounds, opened.spec.max_context)
                figures.append(Figure(axis, value, 1000 * seconds, case.batch / seconds))
            engine.dispatcher.lane.close()
    table(
        ("varied", "value", "ms a step", "tok/s"),
        [(f.axis, str(f.value), f"{f.milliseconds:.0f}", f"{f.tokens_per_second:.1f}") for f in figures],
    )
    if out:
        save(out, figures, dtype=dtype)


if __name__ == "__main__":
    typer.run(main)
