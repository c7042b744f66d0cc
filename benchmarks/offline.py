"""Decode and prefill without HTTP: tokens per second by lane, and where a step's time goes.

    python -m benchmarks.offline CHECKPOINT [--lanes local,object_ref,zmq] [--batches 1,8,32] [--groups 2]

Every figure is a median over rounds in which the lanes take turns; ratios are medians of ratios within a round. Each
round also measures what the machine can do at all (actors/probe/limits.py).
"""

import os
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

os.environ["OMP_WAIT_POLICY"] = "passive"  # before torch: fronts and replicas compute in turn on the same cores

import typer

from actors.probe.limits import Gauge, Limits
from benchmarks.cases import BUDGET, Case, make_cases
from benchmarks.lanes import INT8, LANES, expert_cluster, local_dispatcher, make_engine
from benchmarks.report import save, table
from cluster.models.checkpoint import Checkpoint

# What `unix` is to reach of `local`, by the number of groups.
AIMS = {
    1: {"decode 1": 0.90, "decode 8": 0.95, "decode 32": 0.97, "prefill 512": 0.97},
    2: {"decode 1": 0.80, "decode 8": 0.90, "decode 32": 0.95, "prefill 512": 0.95},
}


@dataclass(frozen=True, slots=True)
class Figure:
    """`seconds` per step (decode) or prompt (prefill); `ratio` is this lane's speed over local's in the same round,
    `limit_share` what of the machine's own limits it reaches (limits.py), `flops_per_byte` what decides on the limit.
    """

    case: str
    lane: str
    tokens_per_second: float
    seconds: float
    ratio: float
    limit_share: float
    gflops: float
    flops_per_byte: float
    phases: dict[str, float]


class Stopwatch:
    """Wraps an engine's parts so that a step's time is told apart by phase."""

    def __init__(self, engine: Any) -> None:
        self.seconds: dict[str, float] = {}
        self._engine = engine
        self._step = engine.step
        engine.step = self._count_waiting
        engine.model.logits = self._timed("head", engine.model.logits)

    def _count_waiting(self) -> Any:
        outputs = self._step()
        waited = self._engine.dispatcher.step.wait_seconds
        self.seconds["experts"] = self.seconds.get("experts", 0.0) + waited
        return outputs

    def use(self, dispatcher: Any) -> None:
        """Let the engine dispatch through `dispatcher`, which counts the time that it takes."""
        self._engine.dispatcher = dispatcher

    def _timed(self, phase: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            started = time.perf_counter()
            result = function(*arguments)
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started
            return result

        return call

    def shares(self, total: float) -> dict[str, float]:
        shares = {phase: seconds / total for phase, seconds in self.seconds.items()}
        return shares | {"attention, router and the rest": 1 - sum(shares.values())}


def measure(
    engine: Any, dispatchers: dict[str, Any], cases: dict[str, Case], rounds: int, gauge: Gauge
) -> list[Figure]:
    watch = Stopwatch(engine)
    figures = []
    for name, case in cases.items():
        seconds: dict[str, list[float]] = {lane: [] for lane in dispatchers}
        shares: dict[str, dict[str, float]] = {}
        limits: list[Limits] = []
        for _ in range(rounds):
            limits.append(gauge.measure())
            for lane, dispatcher in dispatchers.items():
                watch.use(dispatcher)
                watch.seconds.clear()
                started = time.perf_counter()
                seconds[lane].append(case.run(engine))
                shares[lane] = watch.shares(time.perf_counter() - started)
        for lane, taken in seconds.items():
            base, cost, median = seconds.get("local", taken), case.cost(lane), statistics.median(taken)
            figures.append(
                Figure(
                    name,
                    lane,
                    case.num_tokens / median,
                    median,
                    statistics.median(b / t for b, t in zip(base, taken, strict=True)),
                    statistics.median(limit.seconds(cost) / t for limit, t in zip(limits, taken, strict=True)),
                    cost.flops / median / 1e9,
                    cost.flops / cost.num_bytes,
                    shares[lane],
                )
            )
    return figures


def main(
    checkpoint: Path,
    lanes: Annotated[
        str,
        typer.Option(help="Comma-separated: local, object_ref, unix, zmq (ipc), tcp; +int8: int8 experts."),
    ] = ",".join(LANES),
    batches: str = "1,8,32",
    prompts: str = "512,2048",
    context: int = 128,
    groups: int = 2,
    replicas: int = 1,
    steps: int = 12,
    rounds: int = 5,
    threads: int = os.cpu_count() or 1,
    replica_threads: Annotated[int | None, typer.Option(help="Of each replica; default: the cores shared.")] = None,
    dtype: str = "bfloat16",
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Measure CHECKPOINT offline."""
    with expert_cluster(
        checkpoint, groups, replicas, dtype, with_int8=INT8 in lanes, threads=replica_threads
    ) as cluster:
        from actors.process.limits import limit_threads

        limit_threads(threads)
        from actors.compute import Compute

        opened, compute = Checkpoint.open(checkpoint), Compute.choose("cpu", dtype)
        engine = make_engine(opened, compute, 48 * 1024, BUDGET)
        dispatchers = {
            lane: local_dispatcher(opened, compute) if lane == "local" else cluster.dispatcher(lane, engine.metrics)
            for lane in lanes.split(",")
        }
        cases = make_cases(opened.spec, numbers(batches), numbers(prompts), steps, context, compute.dtype.itemsize)
        gauge = Gauge(threads)
        figures = measure(engine, dispatchers, cases, rounds, gauge)
    show(figures, AIMS.get(groups, {}))
    if out:
        settings = {"groups": groups, "replicas": replicas, "context": context, "threads": threads, "dtype": dtype}
        save(out, figures, settings=settings, limits=asdict(gauge.median))


def numbers(text: str) -> list[int]:
    """From an option like "1,8,32"; may be empty."""
    return [int(part) for part in text.split(",") if part]


def show(figures: list[Figure], aims: Mapping[str, float]) -> None:
    """`aims`: what the lane unix is to reach of local, by case."""
    table(
        ("case", "lane", "tok/s", "ms", "of local", "aim", "of the limit", "where the time goes"),
        [
            (
                f.case, f.lane, f"{f.tokens_per_second:.1f}", f"{1000 * f.seconds:.1f}", f"{f.ratio:.2f}",
                f"{aims[f.case]:.2f}" if f.lane == "unix" and f.case in aims else "",
                f"{f.limit_share:.2f}", _shares(f),
            )
            for f in figures
        ],
    )  # fmt: skip


def _shares(figure: Figure) -> str:
    return ", ".join(f"{phase} {100 * share:.0f} %" for phase, share in figure.phases.items())


if __name__ == "__main__":
    typer.run(main)
