"""`python -m actors.probe SMALL_MODEL [THREADS [SECONDS]]` prints what was measured, as JSON: the fields of a hardware
profile that actors know. SECONDS are spent on each of its parts, three by default.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from actors.process.limits import limit_threads
from cluster.models.family import parse_config, spec_at
from cluster.planning.hardware import Overheads, Speed

# A layer of a model of a billion weights: what probes of matrices, experts and attention compute.
REFERENCE = parse_config(json.loads(Path(__file__).with_name("reference.json").read_text()))
BUDGET_S = 3.0


def measure(small_model: Path, threads: int, budget_s: float = BUDGET_S) -> dict[str, Any]:
    """Raises ConfigError or ModelError."""
    limit_threads(threads)
    from actors.compute import Compute, describe
    from actors.probe.attending import attention_speed
    from actors.probe.books import step_seconds
    from actors.probe.echo import lane_speeds
    from actors.probe.limits import Gauge
    from actors.probe.products import expert_speeds, linear_speeds

    compute, gauge = Compute.choose("cpu", "bfloat16"), Gauge(threads)
    limits = [gauge.measure() for _ in range(10)]
    lanes = lane_speeds(budget_s)
    return {
        "about": f"{_cpu()}, {threads} threads; {'; '.join(describe(compute, 'auto'))}",
        "device": "cpu",
        "cores": threads,
        "memory_gib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30,
        "read_gb_per_second": max(each.bytes_per_second for each in limits) / 1e9,
        "product_tflops": max(each.flops_per_second for each in limits) / 1e12,
        "linears": [_dump(each) for each in linear_speeds(compute, budget_s)],
        "experts": [_dump(each) for each in expert_speeds(REFERENCE, compute, budget_s)],
        "attention": attention_speed(REFERENCE, compute, budget_s).model_dump(),
        "lanes": {name: each.model_dump() for name, each in lanes.items()},
        "overheads": _overheads(step_seconds(small_model, compute), spec_at(small_model).num_layers).model_dump(),
    }


def _cpu() -> str:
    names = (
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    )
    return next(names, "unknown CPU")


def _overheads(seconds: dict[int, float], num_layers: int) -> Overheads:
    """From steps whose arithmetic costs next to nothing: each sequence's share of what grows, and half of what does not
    by layers, half by step.
    """
    (few, base), (many, more) = sorted(seconds.items())
    sequence = max(0.0, (more - base) / (many - few))
    fixed = 1e6 * max(0.0, base - few * sequence)
    return Overheads(step_us=fixed / 2, sequence_us=1e6 * sequence, layer_us=fixed / 2 / num_layers, dispatch_us=0.0)


def _dump(speed: Speed) -> dict[str, float]:
    return speed.model_dump()


def main(small_model: str, threads: str = "", seconds: str = "") -> None:
    found = measure(Path(small_model), int(threads or os.cpu_count() or 1), float(seconds or BUDGET_S))
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
