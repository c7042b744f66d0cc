"""What `outcrop plan` predicts against what is measured: decode and prompts by layout, HTTP, and a replica's death.

    python -m benchmarks.plan_error CHECKPOINT --hardware PROFILE [--out FILE]
    python -m benchmarks.plan_error CHECKPOINT --hardware PROFILE --measured FILE

The profile is that of this machine: `outcrop probe`. With --measured, only the prediction is made anew, beside what
such a run has written before. Fronts, replicas, server and client share this machine.
"""

import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

os.environ["OMP_WAIT_POLICY"] = "passive"

import typer

from benchmarks.report import environment, table
from cluster.models.family import spec_at
from cluster.planning.hardware import HardwareProfile, read_profile
from cluster.planning.layout import Layout
from cluster.planning.steady_state import Serving
from cluster.planning.step_time import StepModel
from cluster.planning.workload import Batch, ServedModel, Traffic

LAYOUTS = ((1, 1), (2, 1), (2, 2))  # groups, replicas of each
BATCHES = (1, 8, 32)
PROMPT, CONTEXT, STEPS, ROUNDS = 512, 32, 12, 3
STREAMS, HTTP_PROMPT, HTTP_TOKENS, HTTP_REQUESTS = (8, 32), 32, 32, 2
AIM_MEDIAN, AIM_WORST = 0.10, 0.25


@dataclass(frozen=True, slots=True)
class Case:
    """`unit` of what is predicted and measured: ms, or tok/s."""

    name: str
    unit: str
    predict: Callable[[], float]


@dataclass(frozen=True, slots=True)
class Figure:
    case: str
    unit: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Of the prediction, as a share of what was measured."""
        return self.predicted / self.measured - 1


def cases(model: ServedModel, node: HardwareProfile) -> list[Case]:
    """All sixteen, by what the model of a step says of them."""
    found = []
    for groups, replicas in LAYOUTS:
        steps = StepModel(model, _layout(node, groups, replicas))
        name = f"{groups} x {replicas}"
        for batch in BATCHES:
            found.append(Case(f"decode {batch}, {name}", "ms", partial(_decode_ms, steps, batch)))
        found.append(Case(f"prefill {PROMPT}, {name}", "ms", partial(_prefill_ms, steps)))
    for streams in STREAMS:
        found.append(Case(f"HTTP, {streams} streams", "tok/s", partial(_http, model, node, streams)))
    steps = StepModel(model, _layout(node, 2, 2))
    found.append(Case("death of a replica: longest step", "ms", partial(_death_ms, steps)))
    found.append(Case("decode 8 after it", "ms", partial(_decode_ms, StepModel(model, _layout(node, 2, 1)), 8)))
    return found


def _layout(node: HardwareProfile, groups: int, replicas: int) -> Layout:
    return Layout(1, groups, replicas, "unix", node, node, is_shared=True)


def _decode_ms(steps: StepModel, batch: int) -> float:
    return 1e3 * steps.step(Batch(batch, CONTEXT + STEPS / 2)).total


def _prefill_ms(steps: StepModel) -> float:
    return 1e3 * steps.step(Batch(prompt_tokens=PROMPT, prompt_context=PROMPT)).total


def _death_ms(steps: StepModel) -> float:
    """A step in which one exchange is made twice: the end of a stream is noticed at once."""
    return _decode_ms(steps, 8) + 1e3 * (steps.lane(8) + steps.answer(8))


def _http(model: ServedModel, node: HardwareProfile, streams: int) -> float:
    traffic = Traffic(HTTP_PROMPT, HTTP_TOKENS, concurrency=streams)
    return Serving(model, _layout(node, 2, 1), traffic).rate * HTTP_TOKENS


def measure(checkpoint: Path) -> dict[str, float]:
    """By the name of the case."""
    found: dict[str, float] = {}
    parts = [partial(_measure_engine, checkpoint, *layout) for layout in LAYOUTS]
    for part in (*parts, partial(_measure_http, checkpoint)):
        new = part()
        print(", ".join(f"{case}: {value:.1f}" for case, value in new.items()), file=sys.stderr)
        found |= new
    return found


def _measure_engine(checkpoint: Path, groups: int, replicas: int) -> dict[str, float]:
    from benchmarks.lanes import expert_cluster, make_engine
    from cluster.models.checkpoint import Checkpoint

    cores = os.cpu_count() or 1
    threads = min(cores, max(1, 2 * cores // (groups * replicas)))  # as plan_resources gives native kernels
    with expert_cluster(checkpoint, groups, replicas, threads=threads) as cluster:
        from actors.process.limits import limit_threads

        limit_threads(cores)
        from actors.compute import Compute

        engine = make_engine(Checkpoint.open(checkpoint), Compute.choose("cpu", "bfloat16"), 16 * 1024, PROMPT)
        engine.dispatcher = cluster.dispatcher("unix", engine.metrics)
        name, found = f"{groups} x {replicas}", {}
        for batch in BATCHES:
            steps = [statistics.median(_decode(engine, batch)) for _ in range(ROUNDS)]
            found[f"decode {batch}, {name}"] = 1e3 * min(steps)
        found[f"prefill {PROMPT}, {name}"] = 1e3 * min(_prefill(engine) for _ in range(ROUNDS))
        if replicas > 1:
            found |= _die(engine)
        engine.dispatcher.lane.close()
    return found


def _decode(engine: Any, batch: int) -> list[float]:
    """Seconds of each step."""
    return list(_steps(engine, batch, STEPS))


def _steps(engine: Any, batch: int, steps: int) -> Iterator[float]:
    from cluster.messages.requests import GenerationRequest, SamplingParams

    params = SamplingParams(max_tokens=steps + 8, temperature=0.0)
    for i in range(batch):
        prompt = tuple((7 * i + 13 * j) % 4000 + 300 for j in range(CONTEXT))
        engine.add(GenerationRequest(str(i), "", prompt, params))
    while any(s.num_output < 2 for s in engine.sequences.values()):
        engine.step()
    for _ in range(steps):
        started = time.perf_counter()
        engine.step()
        yield time.perf_counter() - started
    for request_id in tuple(engine.sequences):
        engine.abort(request_id)


def _prefill(engine: Any) -> float:
    from benchmarks.cases import prefill

    return prefill(engine, PROMPT)


def _die(engine: Any) -> dict[str, float]:
    """Kill the process of a replica in the middle of a decode. The first of a group is the one that is asked first."""
    import ray

    from benchmarks.lanes import NAMESPACE

    steps = _steps(engine, 8, 3 * STEPS)
    for _ in range(STEPS):
        next(steps)
    ray.kill(ray.get_actor("auto-g0-r0", namespace=NAMESPACE))
    during = [next(steps) for _ in range(STEPS)]
    after = list(steps)
    return {
        "death of a replica: longest step": 1e3 * max(during),
        "decode 8 after it": 1e3 * statistics.median(after),
    }


def _measure_http(checkpoint: Path) -> dict[str, float]:
    from benchmarks.serving import prompt_of, serving
    from deploy.cli.load_test import stream_all

    found = {}
    with serving(checkpoint, 2, "bfloat16", "auto") as url:
        asyncio.run(stream_all(url, [prompt_of(i, HTTP_PROMPT) for i in range(2)], 4))
        for streams in STREAMS:
            prompts = [prompt_of(i, HTTP_PROMPT) for i in range(HTTP_REQUESTS * streams)]
            results = asyncio.run(stream_all(url, prompts, HTTP_TOKENS, streams))
            assert not results.errors, results.errors[0]
            found[f"HTTP, {streams} streams"] = results.num_tokens / results.seconds
    return found


def compare(wanted: list[Case], measured: dict[str, float]) -> list[Figure]:
    return [Figure(each.name, each.unit, each.predict(), measured[each.name]) for each in wanted]


def show(figures: list[Figure]) -> None:
    errors = [abs(each.error) for each in figures]
    rows = [
        (each.case, each.unit, f"{each.predicted:.1f}", f"{each.measured:.1f}", f"{100 * each.error:+.0f} %")
        for each in figures
    ]
    table(("case", "unit", "predicted", "measured", "error"), rows)
    print(
        f"median error {100 * statistics.median(errors):.0f} % (aim {100 * AIM_MEDIAN:.0f} %), "
        f"worst {100 * max(errors):.0f} % (aim {100 * AIM_WORST:.0f} %)"
    )


def main(
    checkpoint: Path,
    hardware: Annotated[str, typer.Option(help="Profile of this machine: a file of `outcrop probe`, or its name.")],
    measured: Annotated[Path | None, typer.Option(help="A file of --out: measure nothing.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Compare plan and truth for CHECKPOINT, or its config.json with --measured."""
    model, node = ServedModel.of(spec_at(checkpoint)), read_profile(hardware)
    figures = compare(cases(model, node), read_measured(measured) if measured else measure(checkpoint))
    show(figures)
    if out:
        out.write_text(as_json(node.name, figures))


def read_measured(file: Path) -> dict[str, float]:
    """From what as_json wrote."""
    return {each["case"]: each["measured"] for each in json.loads(file.read_text())["figures"]}


def as_json(hardware: str, figures: list[Figure]) -> str:
    content = {"environment": environment(), "hardware": hardware, "figures": [asdict(f) for f in figures]}
    return json.dumps(content, indent=1) + "\n"


if __name__ == "__main__":
    typer.run(main)
