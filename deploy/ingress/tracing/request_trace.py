"""What a traced request goes through, until it becomes spans (deploy/ingress/tracing/spans.py). Knows no OpenTelemetry.

Hosts' clocks differ, so fronts send durations. They are laid end to end from when the request was offered to its front,
by this process's monotonic clock: a message's way to the front counts as the queue's begin, the way back as nothing.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cluster.messages.requests import RequestOutput, SamplingParams, Timing
from deploy.ingress.openai.choices import Choice

if TYPE_CHECKING:
    from deploy.ingress.fronts.output_stream import OutputStream

Attributes = dict[str, Any]
COSTS = ("num_steps", "expert_wait_seconds", "expert_compute_seconds", "num_failovers", "num_local_tokens")


@dataclass(slots=True)
class Stage:
    """A part of the request's time: times are those of time.monotonic()."""

    name: str
    started: float
    ended: float
    attributes: Attributes = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return self.ended - self.started

    def add(self, timing: Timing) -> None:
        """Prolong it. Sums over steps, which are shared with the requests that were batched with this one."""
        self.ended += timing.seconds
        for name in COSTS:
            self.attributes[f"outcrop.{name}"] = self.attributes.get(f"outcrop.{name}", 0) + getattr(timing, name)


class RequestTrace:
    """`choices` is empty while the request has not been understood; n of them continue each prompt."""

    def __init__(self) -> None:
        self.trace_id = ""
        self.started, self.started_ns = time.monotonic(), time.time_ns()
        self.stages: list[Stage] = []
        self.n = 1
        self.choices: Sequence[Choice] = ()
        self.params = SamplingParams()
        self.first_token: float | None = None
        self.error: str | None = None
        self._last: dict[int, Stage] = {}  # of each choice

    def tokenised(self, started: float) -> None:
        self.stages.append(Stage("tokenise", started, time.monotonic()))

    def begin(self, n: int, choices: Sequence[Choice], params: SamplingParams) -> None:
        self.n, self.choices, self.params = n, choices, params

    def observe(self, choice: int, stream: "OutputStream", output: RequestOutput) -> None:
        if output.token_ids and self.first_token is None:
            self.first_token = time.monotonic()
        self.error = self.error or output.error
        if timing := output.timing:
            self._last[choice] = self._stage(choice, stream, timing)
            self._last[choice].add(timing)

    def _stage(self, choice: int, stream: "OutputStream", timing: Timing) -> Stage:
        """The stage that the output ends or prolongs."""
        attributes: Attributes = {"outcrop.choice": choice, "outcrop.front": stream.front}
        if timing.queue_seconds is not None:  # the first output of a front: another one may have taken over
            queue = Stage("queue", stream.offered, stream.offered + timing.queue_seconds, attributes)
            self.stages += queue, Stage("prefill", queue.ended, queue.ended, dict(attributes))
        elif self._last[choice].name == "prefill":
            self.stages.append(Stage("decode", self._last[choice].ended, self._last[choice].ended, attributes))
        else:
            return self._last[choice]
        return self.stages[-1]

    def wall_ns(self, moment: float) -> int:
        """A time of time.monotonic() as Unix time, by one look at both clocks: a step of the latter tears nothing."""
        return self.started_ns + round((moment - self.started) * 1e9)

    def longest(self, name: str) -> float:
        """Seconds of the longest stage of this name: choices take their time side by side."""
        return max((stage.seconds for stage in self.stages if stage.name == name), default=0.0)
