"""Who asks for what, and when: at random by a rate, or as a trace has recorded it."""

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request: seconds from the start, tokens of its prompt, and new tokens."""

    at: float
    input_len: int
    output_len: int


def poisson(rate: float, seconds: float, input_len: int, output_len: int, seed: int) -> Iterator[Arrival]:
    """`rate` requests per second at random times. Lengths lie evenly between half and one and a half of those given."""
    dice, at = random.Random(seed), 0.0
    while (at := at + dice.expovariate(rate)) < seconds:
        yield Arrival(at, _about(input_len, dice), _about(output_len, dice))


def _about(length: int, dice: random.Random) -> int:
    return max(1, round(length * dice.uniform(0.5, 1.5)))


def read_trace(path: Path, seconds: float) -> Iterator[Arrival]:
    """A line of JSON for each request: {"at": 0.5, "input_len": 700, "output_len": 120}, in the order of time; what
    comes after `seconds` is left out. Raises ConfigError that names the line.
    """
    last = 0.0
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"trace={str(path)!r} can't be read: {error}") from None
    for number, line in enumerate(lines, 1):
        arrival = _read(line, f"trace={str(path)!r}, line {number}")
        if arrival.at < last:
            raise ConfigError(
                f"trace={str(path)!r}, line {number}: at={arrival.at:g} is before the line above: sort it"
            )
        last = arrival.at
        if arrival.at < seconds:
            yield arrival


def _read(line: str, where: str) -> Arrival:
    try:
        raw = json.loads(line)
        arrival = Arrival(float(raw["at"]), int(raw["input_len"]), int(raw["output_len"]))
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ConfigError(f'{where}: {error!r}; write {{"at": 0.5, "input_len": 700, "output_len": 120}}') from None
    if not math.isfinite(arrival.at) or arrival.at < 0 or min(arrival.input_len, arrival.output_len) < 1:
        raise ConfigError(f"{where}: at must be 0 or more, and lengths 1 or more")
    return arrival
