"""`outcrop simulate`: an hour of traffic on a plan, with what goes wrong, in minutes and without the machines."""

import importlib
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from cluster.config import load_config
from cluster.errors import ConfigError, ModelError
from cluster.models.family import spec_at
from cluster.planning.hardware import HardwareProfile, read_profile
from cluster.planning.layout import Layout, PlannedLane, lane_between
from cluster.planning.memory import most_sequences
from cluster.planning.workload import ServedModel, check_positive
from deploy.cli.http import console, fail
from deploy.demo import expand_demo

MOST_LINES = 20


def simulate(
    plan: Annotated[
        Path, typer.Argument(metavar="PLAN", help="What `outcrop plan --out` wrote, or a YAML file of settings.")
    ],
    hardware: Annotated[list[str], typer.Option(help="Profile of fronts' nodes; once more: of replicas' nodes.")],
    trace: Annotated[str, typer.Option(help="`poisson`, or a file with a line of JSON for each request.")] = "poisson",
    rate: Annotated[float, typer.Option(help="Requests per second, for poisson.")] = 1.0,
    input_len: Annotated[int, typer.Option(help="Tokens of a prompt, about, for poisson.", min=1)] = 1000,
    output_len: Annotated[int, typer.Option(help="Tokens of an answer, about, for poisson.", min=1)] = 200,
    hours: Annotated[float, typer.Option(help="How long requests come.")] = 1.0,
    failures: Annotated[
        str, typer.Option("--fail", help="'kill 3 replicas at 600 s; node at 1200 s; hot expert from 1800 s'")
    ] = "",
    compare: Annotated[
        str, typer.Option(help="Policies beside the plan: 'rebalance_interval_s=60,300; hedge_share=0,0.1'")
    ] = "",
    model: Annotated[
        Path | None, typer.Option(help="A config.json or its directory, where the plan names a Hub id.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of all that is random.", min=0)] = 0,
    spread: Annotated[
        float, typer.Option(help="How unlike experts are: deviation of log popularity; 0: alike.", min=0.0, max=10.0)
    ] = 0.5,
    start_s: Annotated[
        float, typer.Option(help="Seconds until a new process can read weights.", min=0.0, max=86400.0)
    ] = 10.0,
    load_gb_per_second: Annotated[float, typer.Option(help="How fast it reads them.")] = 1.0,
    cost_per_hour: Annotated[float | None, typer.Option(help="Price of a device; default: the profile's.")] = None,
    lane: Annotated[
        Literal["unix", "zmq", "object_ref", "local"] | None, typer.Option(help="Default: the plan's.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures and events to this file.")] = None,
) -> None:
    """Simulate PLAN under traffic and failures: latencies, stalls, scaling, balance and cost."""
    # Named, not imported: the command line does not depend on what runs on the accelerators.
    simulation = importlib.import_module("actors.simulation.simulation")
    comparison = importlib.import_module("actors.simulation.comparison")
    try:
        check_positive(hours=hours, rate=rate, load_gb_per_second=load_gb_per_second, cost_per_hour=cost_per_hour)
        traffic = _traffic(trace, rate, hours, input_len, output_len, seed)
        options = _options(
            plan, model, _profiles(hardware, cost_per_hour), lane, hours, failures, traffic,
            seed=seed, spread=spread, start_s=start_s, load_gb_per_second=load_gb_per_second,
        )  # fmt: skip
        runs = list(comparison.variants(options, compare))
        began = time.process_time()
        outcomes = {name: simulation.Simulation(each).run() for name, each in runs}
    except (ConfigError, ModelError) as error:
        raise fail(str(error)) from None
    _show({name: outcome.figures() for name, outcome in outcomes.items()})
    planned = outcomes["as planned"]
    steps, spent = sum(outcome.num_steps for outcome in outcomes.values()), time.process_time() - began
    console.print(f"{len(runs)} x {hours:g} h, {steps:,} steps of fronts, simulated in {spent:.1f} s of CPU")
    _show_events(planned.events)
    if json_file:
        content = json.dumps({n: o.everything() for n, o in outcomes.items()}, indent=1) + "\n"
        try:
            json_file.write_text(content)
        except OSError as error:
            raise fail(f"json={str(json_file)!r} can't be written: {error}") from None


def _traffic(trace: str, rate: float, hours: float, input_len: int, output_len: int, seed: int) -> Callable[[], Any]:
    """Raises ConfigError for a trace that can't be read: now, not in the middle."""
    traffic = importlib.import_module("actors.simulation.traffic")
    if trace == "poisson":
        return partial(traffic.poisson, rate, 3600 * hours, input_len, output_len, seed)
    known = list(traffic.read_trace(Path(trace), 3600 * hours))
    return lambda: iter(known)


def _profiles(names: list[str], cost_per_hour: float | None) -> list[HardwareProfile]:
    if len(names) > 2:
        raise ConfigError(f"hardware={', '.join(names)}: name one profile, or one for fronts and one for replicas")
    found = [read_profile(name) for name in names]
    if cost_per_hour is None:
        return found
    return [profile.model_copy(update={"cost_per_hour": cost_per_hour}) for profile in found]


def _options(
    plan: Path,
    model: Path | None,
    profiles: list[HardwareProfile],
    lane: PlannedLane | None,
    hours: float,
    failures: str,
    arrivals: Callable[[], Any],
    **given: Any,
) -> Any:
    parsed = importlib.import_module("actors.simulation.failures").parse_failures(failures)
    config = expand_demo(load_config({}, plan, environ={}))  # a plan says all: not what is exported in some shell
    dtype = "bfloat16" if config.dtype == "auto" else config.dtype
    served = ServedModel.of(spec_at(model or Path(config.model)), dtype)
    front, replica = profiles[0], profiles[-1]
    actors = config.fronts + config.groups * config.replicas
    chosen = lane or (lane_between(front, replica, actors) if config.lane == "auto" else config.lane)
    is_local = chosen == "local"
    is_shared = front.device == "cpu" and front.name == replica.name
    is_shared = is_shared and (config.fronts == 1 if is_local else chosen == "unix")
    groups, replicas = (1, 1) if is_local else (config.groups, config.replicas)
    layout = Layout(config.fronts, groups, replicas, chosen, front, replica, is_shared)
    if most_sequences(served, layout, 1) == 0:
        raise ConfigError(
            f"plan={str(plan)!r} does not fit the memory of {front.name} and {replica.name}: see `outcrop plan`"
        )
    options = importlib.import_module("actors.simulation.options")
    return options.Options(config, served, layout, arrivals, 3600 * hours, parsed, **given)


def _show(figures: dict[str, dict[str, Any]]) -> None:
    head = ("policy", "finished", "refused", "tokens/s", "TTFT p50 / p99", "TPOT p50 / p99", "stalls", "longest, s")
    table = Table(*head, "balance", "cost", title="latencies in ms", title_justify="left")
    for name, each in figures.items():
        latencies = [
            " / ".join(f"{values[p]:,.0f}" for p in ("p50", "p99")) if values else "-"
            for values in (each["ttft_ms"], each["tpot_ms"])
        ]
        cost = "-" if each["cost"] is None else f"{each['cost']:,.2f}"
        counts = [f"{each[key]:,.0f}" for key in ("finished", "refused", "tokens_per_second")]
        stalls = f"{each['stalls']:,}", f"{each['longest_stall_s']:.2f}"
        table.add_row(name, *counts, *latencies, *stalls, f"{each['balancedness']:.3f}", cost)
    console.print(table)


def _show_events(events: list[tuple[float, str]]) -> None:
    for at, what in events[:MOST_LINES]:
        console.print(f"{at:8,.1f} s  {what}")
    if len(events) > MOST_LINES:
        console.print(f"and {len(events) - MOST_LINES} more: see --json")
