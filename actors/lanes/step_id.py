"""Names of steps, as both ends of a lane write them into their log lines. Knows no tensors."""

from typing import NamedTuple


class StepId(NamedTuple):
    """Which step of which front a dispatch belongs to. Both ends write it into their log lines; nothing else uses it.

    `front` is slot * 256 + restarts, of which the last 8 bits travel; `number` counts steps modulo 2**32.
    """

    front: int = 0
    number: int = 0

    @classmethod
    def first_of(cls, actor_id: str) -> "StepId":
        """For the actor ids that the supervisor gives: "front-3", and "front-3.1" after a restart."""
        slot, _, restarts = actor_id.rpartition("-")[2].partition(".")
        return cls((int(slot) << 8 | int(restarts or 0) & 0xFF) & 0xFFFF)

    def next(self) -> "StepId":
        return StepId(self.front, (self.number + 1) & 0xFFFFFFFF)

    def __str__(self) -> str:
        slot, restarts = divmod(self.front, 256)
        return f"front-{slot}{f'.{restarts}' if restarts else ''}:{self.number}"


NO_STEP = StepId()
