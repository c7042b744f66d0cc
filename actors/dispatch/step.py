"""The engine step that is running, and what its experts have cost so far. Knows no tensors."""

from dataclasses import dataclass, field

from actors.lanes.step_id import StepId


@dataclass(slots=True)
class Step:
    """`id` and `request_ids` are what log lines name it by.

    `wait_seconds`: the front's own time in dispatch and combine. `compute_seconds`: the experts' computation, summed
    over messages; those computed together with other messages count the whole of it.
    """

    id: StepId = field(default_factory=StepId)
    request_ids: tuple[str, ...] = ()
    wait_seconds: float = 0.0
    compute_seconds: float = 0.0
    num_failovers: int = 0
    num_local_tokens: int = 0

    @property
    def extra(self) -> dict[str, object]:
        """For log lines."""
        return {"step": str(self.id), "request_ids": list(self.request_ids)}
