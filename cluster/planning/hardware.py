"""HardwareProfile: what a kind of node can do, as `outcrop probe` has measured it or as a data sheet says.

A profile is a small JSON file. Times and speeds are those of one device: a GPU, or all cores of a machine without one.
"""

import json
import math
from bisect import bisect_left
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from cluster.errors import ConfigError
from cluster.validation import describe

VERSION = 1
PROFILES = Path(__file__).parent / "profiles"
# Lanes that a profile may describe: `local` needs no figures, `auto` is one of these.
MeasuredLane = Literal["unix", "zmq", "object_ref"]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Speed(_Strict):
    """Matrices of bfloat16 that are multiplied with `rows` rows each: weights that are passed per second, in GB."""

    rows: Positive
    gb_per_second: Positive


class AttentionSpeed(_Strict):
    """Over the paged cache: keys and values that decodes read, and products of queries with keys and values."""

    gb_per_second: Positive
    tflops: Positive


class LaneSpeed(_Strict):
    """A dispatch to one group and its answer, without arithmetic; each further group; all bytes, both ways."""

    round_trip_us: Positive
    hop_us: NotNegative
    gb_per_second: Positive

    def seconds(self, groups: float, num_bytes: float) -> float:
        """Of one exchange with so many groups, which moves so many bytes in all."""
        return 1e-6 * (self.round_trip_us + self.hop_us * (groups - 1)) + 1e-9 * num_bytes / self.gb_per_second


class Overheads(_Strict):
    """What is left when arithmetic, memory and lanes are taken off. Microseconds: of a step, of each sequence in it, of
    each layer in the front, and of each dispatch in a replica.
    """

    step_us: NotNegative
    sequence_us: NotNegative
    layer_us: NotNegative
    dispatch_us: NotNegative


class HttpSpeed(_Strict):
    """CPU that ingress and proxy take for each streamed token; what a request takes before its front has it."""

    token_us: Positive
    request_ms: NotNegative


class HardwareProfile(_Strict):
    """One kind of node. `devices` of a node each have `memory_gib`; `cores` are the node's. `linears` are the front's
    matrices, `experts` those of replicas. `cost_per_hour` is a device's, in any currency.
    """

    version: Literal[1]
    name: str = Field(pattern=r"^[a-z0-9][-a-z0-9.]*$")
    source: Literal["measured", "data sheet"]
    about: str
    device: Literal["cpu", "cuda"]
    devices: int = Field(1, ge=1)
    cores: int = Field(ge=1)
    memory_gib: Positive
    cost_per_hour: Positive | None = None
    read_gb_per_second: Positive
    product_tflops: Positive
    linears: tuple[Speed, ...] = Field(min_length=1)
    experts: tuple[Speed, ...] = Field(min_length=1)
    attention: AttentionSpeed
    lanes: dict[MeasuredLane, LaneSpeed] = Field(min_length=1)
    overheads: Overheads
    http: HttpSpeed

    @field_validator("linears", "experts")
    @classmethod
    def _is_ascending(cls, value: tuple[Speed, ...]) -> tuple[Speed, ...]:
        if any(low.rows >= high.rows for low, high in pairwise(value)):
            raise ValueError("rows must ascend: measure again with `outcrop probe`")
        return value

    def __hash__(self) -> int:
        """By the name: lanes are a mapping. Layouts, which have profiles, are keys."""
        return hash(self.name)

    def lane(self, name: MeasuredLane) -> LaneSpeed:
        """Raises ConfigError if it was not measured."""
        if name not in self.lanes:
            raise ConfigError(
                f"lanes={', '.join(self.lanes)} of the profile {self.name} lacks {name}: measure it with "
                "`outcrop probe`, or choose another --lane"
            )
        return self.lanes[name]


def speed_at(points: Sequence[Speed], rows: float) -> float:
    """Bytes of weights per second at so many rows each, between the measured ones by a line through logarithms. Below
    the first it is the first's; beyond the last, arithmetic binds, and it falls as rows grow.
    """
    if rows <= points[0].rows:
        return 1e9 * points[0].gb_per_second
    last = points[-1]
    if rows >= last.rows:
        return 1e9 * last.gb_per_second * last.rows / rows
    high = bisect_left(points, rows, key=lambda point: point.rows)
    a, b = points[high - 1], points[high]
    share = math.log(rows / a.rows) / math.log(b.rows / a.rows)
    return float(1e9 * a.gb_per_second ** (1 - share) * b.gb_per_second**share)


def roofline(gb_per_second: float, tflops: float) -> tuple[Speed, ...]:
    """The speeds that these two limits allow. A weight of bfloat16 has two bytes and two operations for each row, so at
    `rows` the weights pass no faster than operations per second / rows.
    """
    corner = 1e3 * tflops / gb_per_second
    return (Speed(rows=1, gb_per_second=gb_per_second), Speed(rows=max(2.0, corner), gb_per_second=gb_per_second))


@cache
def known_profiles() -> tuple[str, ...]:
    """Names of the profiles that come with Outcrop."""
    return tuple(sorted(path.stem for path in PROFILES.glob("*.json")))


def read_profile(name: str) -> HardwareProfile:
    """A profile that comes with Outcrop, by its name, or a file. Raises ConfigError."""
    path = PROFILES / f"{name}.json" if name in known_profiles() else Path(name)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return HardwareProfile.model_validate(content)
    except ValidationError as error:
        told = describe(error, HardwareProfile.model_fields)
        raise ConfigError(f"{path}: {told} (this Outcrop reads profiles of version {VERSION})") from None
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"hardware={name!r} can't be read: {error}; name a file that `outcrop probe` wrote, or one of "
            f"{', '.join(known_profiles())}"
        ) from None
