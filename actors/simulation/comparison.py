"""Policies side by side: the same traffic and failures, one setting changed at a time."""

import math
from collections.abc import Iterator
from dataclasses import replace

from pydantic import ValidationError

from actors.simulation.options import Options
from cluster.config import ClusterConfig
from cluster.errors import ConfigError
from cluster.validation import describe

# Policies that are no settings of a cluster, but of a simulation.
OWN = ("hedge_share", "start_s", "load_gb_per_second", "spread")
# What the model of a step is made of.
FIXED = ("model", "dtype", "lane", "device", "front_device", "replica_device")


def variants(options: Options, text: str) -> Iterator[tuple[str, Options]]:
    """What `rebalance_interval_s=60,300; redundant_experts=0,8; hedge_share=0,0.1` asks for, under the names of its
    parts, behind the options as they are. Raises ConfigError that names the part.
    """
    yield "as planned", options
    for part in filter(None, (part.strip() for part in text.split(";"))):
        name, is_given, values = (piece.strip() for piece in part.partition("="))
        if name in FIXED:
            raise ConfigError(f"compare={part!r}: {name} is the same for all that are compared: simulate another plan")
        if not is_given or not values or (name not in OWN and name not in ClusterConfig.model_fields):
            known = f"a setting of `outcrop serve`, {', '.join(OWN)}"
            raise ConfigError(f"compare={part!r}: write NAME=VALUE,VALUE with {known}")
        for value in values.split(","):
            yield f"{name}={value.strip()}", _changed(options, name, value.strip(), part)


def _changed(options: Options, name: str, value: str, part: str) -> Options:
    if name in OWN:
        try:
            number = float(value)
        except ValueError:
            raise ConfigError(f"compare={part!r}: {name}={value!r} is no number") from None
        if not math.isfinite(number) or number < 0 or (name == "load_gb_per_second" and number == 0):
            raise ConfigError(f"compare={part!r}: {name}={value!r} must be a number, and not below 0")
        return replace(options, **{name: number})  # type: ignore[arg-type]
    settings = options.config.model_dump(exclude_unset=True) | {name: None if value == "none" else value}
    try:
        config = ClusterConfig.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(f"compare={part!r}: {describe(error, ClusterConfig.model_fields)}") from None
    layout = replace(options.layout, fronts=config.fronts)
    if not layout.is_local:
        layout = replace(layout, groups=config.groups, replicas=config.replicas)
    return replace(options, config=config, layout=layout)
