"""What a check is, and how one half of it is run: on the CPU, or on the GPU."""

import gc
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from cluster.models.checkpoint import Checkpoint

Result = Literal["passed", "failed", "not run"]
# (name of a shape, number of layers) -> a checkpoint of random weights
Checkpoints = Callable[[str, int], Checkpoint]


class NotRunError(Exception):
    """This machine lacks what a check needs."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """`hidden`, `expert_size` and `experts` of the products; `pairs` of rows and experts. Contexts are at most
    `context` tokens, `steps` are timed. `gpu_shape` is the model that speed is measured with on a GPU.
    """

    hidden: int = 1024
    expert_size: int = 512
    experts: int = 32
    pairs: int = 512
    context: int = 4096
    steps: int = 32
    batches: tuple[int, ...] = (1, 16, 64)
    gpu_shape: str = "1b-a400m"
    gpu_layers: int = 4


@dataclass(slots=True)
class Trial:
    """One half of a check while it runs: collects figures, and whatever is not as it should be."""

    device: torch.device
    sizes: Sizes
    checkpoint: Checkpoints
    figures: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def is_on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def expect(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.problems.append(otherwise)

    def synchronize(self) -> None:
        if self.is_on_gpu:
            torch.cuda.synchronize()


@dataclass(frozen=True, slots=True)
class Check:
    """`run` is called once for each half. Whatever it raises is a failure, but for NotRunError."""

    name: str
    shows: str
    run: Callable[[Trial], None]


@dataclass(frozen=True, slots=True)
class Row:
    """The outcome of one half of a check. `why` says what failed, or why it was not run."""

    name: str
    shows: str
    on: str
    result: Result
    why: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


def run_half(check: Check, trial: Trial) -> Row:
    started = time.monotonic()
    on = "GPU" if trial.is_on_gpu else "CPU"
    try:
        with torch.inference_mode():
            check.run(trial)
            trial.synchronize()
    except NotRunError as reason:
        return Row(check.name, check.shows, on, "not run", str(reason))
    except Exception as error:
        traceback.print_exc()
        first = str(error).strip().partition("\n")[0]
        trial.problems.append(f"{type(error).__name__}: {first}")
    gc.collect()  # engines with graphs hold themselves: their memory must not go in the midst of the next check
    result: Result = "failed" if trial.problems else "passed"
    seconds = round(time.monotonic() - started, 2)
    return Row(check.name, check.shows, on, result, "; ".join(trial.problems), trial.figures, seconds)
