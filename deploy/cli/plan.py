"""`outcrop plan`: how many fronts, groups and replicas, on what, for this traffic; and what if one is lost."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import yaml
from pydantic import ValidationError

from cluster.errors import ConfigError, ModelError
from cluster.models.family import spec_at
from cluster.models.spec import ModelSpec
from cluster.planning.expert_use import ExpertUse
from cluster.planning.hardware import read_profile
from cluster.planning.search import Fleet, Plan, pareto, search
from cluster.planning.workload import Goals, ServedModel, Traffic, check_positive
from cluster.planning.written import helm_values, settings
from cluster.validation import describe
from deploy.cli.http import console, fail
from deploy.cli.plan_table import show, shown, verdicts
from deploy.demo import MODEL_DIR

LaneChoice = Literal["unix", "zmq", "object_ref", "local"]


def plan(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A config.json, a directory that has one, or `demo`.")],
    hardware: Annotated[
        list[str],
        typer.Option(help="Profile of a kind of node, and how many devices of it: h100:8 or FILE:1; more than once."),
    ],
    input_len: Annotated[int, typer.Option(help="Tokens of a prompt.", min=1)] = 1024,
    output_len: Annotated[int, typer.Option(help="New tokens of an answer.", min=1)] = 256,
    rate: Annotated[float | None, typer.Option(help="Requests per second, at random times.")] = None,
    concurrency: Annotated[float | None, typer.Option(help="Requests at a time, instead of a rate.")] = None,
    ttft: Annotated[float, typer.Option(help="Milliseconds to the first token, at most, on average.")] = 2000.0,
    tpot: Annotated[float, typer.Option(help="Milliseconds between tokens, at most, on average.")] = 100.0,
    survive: Annotated[int, typer.Option(help="Actors that may be lost at once.", min=0)] = 0,
    cost_per_hour: Annotated[
        list[str] | None, typer.Option(help="Price of a device: 2.5, or h100=2.5; more than once.")
    ] = None,
    expert_counts: Annotated[
        Path | None, typer.Option(help="Answer of /v1/experts: how often experts were chosen; default: evenly.")
    ] = None,
    lane: Annotated[LaneChoice | None, typer.Option(help="Only layouts over this lane.")] = None,
    dtype: Annotated[
        Literal["bfloat16", "float32"], typer.Option(help="Type of weights and activations.")
    ] = "bfloat16",
    top: Annotated[int, typer.Option(help="Layouts to print.", min=1)] = 8,
    serve_as: Annotated[str | None, typer.Option(help="Hub id or path that the files serve; default: MODEL.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the best layout for `outcrop serve --config`.")] = None,
    helm_out: Annotated[
        Path | None, typer.Option("--helm-values", help="Write the best layout as values of the Helm chart.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw throughput by time between tokens (SVG; wants the extra `bench`).")
    ] = None,
) -> None:
    """Plan a layout for MODEL from its config.json alone: what it bears, what it costs, what is left after a loss."""
    try:
        served = _served(model, dtype, expert_counts)
        fleets = _fleets(hardware, cost_per_hour or [])
        traffic, goals = Traffic(input_len, output_len, rate, concurrency), Goals(ttft / 1e3, tpot / 1e3, survive)
        plans = _searched(served, fleets, traffic, goals, lane)
        show(shown(plans, top))
        for line in verdicts(plans, goals):
            console.print(line, soft_wrap=True)
        if plot:
            _draw(pareto(plans, served, goals), plot)
        for file, content in ((out, settings), (helm_out, helm_values)):
            if file:
                _write(file, content(_best(plans), served, serve_as or str(model)))
    except ValidationError as error:
        raise fail(describe(error)) from None
    except (ConfigError, ModelError) as error:
        raise fail(str(error)) from None


def _served(model: Path, dtype: str, counts: Path | None) -> ServedModel:
    """Raises ConfigError or ModelError."""
    spec = spec_at(MODEL_DIR if str(model) == "demo" else model)
    return ServedModel.of(spec, dtype, _use(spec, counts))


def _searched(
    model: ServedModel, fleets: list[Fleet], traffic: Traffic, goals: Goals, lane: LaneChoice | None
) -> list[Plan]:
    """At least one. Raises ConfigError."""
    if traffic.length > model.spec.max_context:
        raise ConfigError(
            f"input_len={traffic.input_len} and output_len={traffic.output_len} are more than the model's context of "
            f"{model.spec.max_context} tokens: lower them"
        )
    if plans := search(model, fleets, traffic, goals, lane):
        return plans
    memory = ", ".join(f"{each.devices} x {each.node.memory_gib:g} GiB ({each.node.name})" for each in fleets)
    total = (model.sizes.front + model.sizes.experts) / 2**30
    raise ConfigError(
        f"hardware={memory}: no layout fits the {total:,.1f} GiB of weights and a sequence's KV cache: name more "
        "devices or larger ones, or shorter sequences"
    )


def _best(plans: list[Plan]) -> Plan:
    """Raises ConfigError."""
    if not plans[0].holds:
        raise ConfigError(
            "no layout holds, so none is written: relax --ttft, --tpot or --survive, or name more --hardware"
        )
    return plans[0]


def _use(spec: ModelSpec, counts: Path | None) -> ExpertUse | None:
    if counts is None:
        return None
    try:
        content = json.loads(counts.read_text(encoding="utf-8"))
        return ExpertUse.measured(spec, content["counts"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"expert_counts={str(counts)!r} is no answer of /v1/experts: {error!r}") from None


def _fleets(hardware: list[str], prices: list[str]) -> list[Fleet]:
    """Raises ConfigError."""
    fleets = [_fleet(each, prices) for each in hardware]
    names = [fleet.node.name for fleet in fleets]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(
            f"hardware={', '.join(hardware)}: two are named {twice!r}: name all its devices in one, h100:8"
        )
    if strange := next((p for p in prices if "=" in p and p.partition("=")[0] not in names), None):
        raise ConfigError(f"cost_per_hour={strange!r}: no --hardware has this name, only {', '.join(names)}")
    return fleets


def _fleet(text: str, prices: list[str]) -> Fleet:
    """From NAME or NAME:COUNT. Raises ConfigError."""
    name, colon, count = text.rpartition(":")
    if not colon:
        name, count = text, "1"
    if not count.isdecimal() or not int(count):
        raise ConfigError(f"hardware={text!r}: write a profile and the number of its devices, such as h100:8")
    node = read_profile(name)
    for price in prices:
        kind, equals, amount = price.rpartition("=")
        try:
            if not equals or kind == node.name:
                node = node.model_copy(update={"cost_per_hour": float(amount)})
        except ValueError:
            raise ConfigError(f"cost_per_hour={price!r}: write 2.5, or h100=2.5") from None
        check_positive(cost_per_hour=node.cost_per_hour)
    return Fleet(node, int(count))


def _write(file: Path, content: dict[str, Any]) -> None:
    try:
        file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{file} can't be written: {error}") from None
    console.print(f"{file} is written")


def _draw(points: list[tuple[float, float]], picture: Path) -> None:
    """Raises ConfigError without matplotlib."""
    try:
        import matplotlib as mpl
    except ImportError:
        raise ConfigError(f"plot={str(picture)!r} wants matplotlib: pip install 'outcrop[bench]'") from None
    mpl.use("svg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(5, 3.4), layout="constrained")
    panel.plot([1e3 * tpot for tpot, _ in points], [tokens for _, tokens in points], marker="o")
    panel.set_xscale("log")
    panel.set_xlabel("milliseconds between tokens, at most")
    panel.set_ylabel("new tokens per second, at most")
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.3)
    try:
        figure.savefig(picture, format="svg", metadata={"Date": None})
    except OSError as error:
        raise ConfigError(f"plot={str(picture)!r} can't be written: {error}") from None
    console.print(f"{picture} is written")
