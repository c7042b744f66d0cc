"""Names of steps, as both ends of a lane write them into their log lines. Knows no tensors."""

from typing import NamedTuple

from cluster.actor_id import ActorId


class StepId(NamedTuple):
    """Which step of which front a dispatch belongs to. Both ends write it into their log lines; nothing else uses it.

    `front` is slot * 256 + restarts, of which the last 8 bits travel; `number` counts steps modulo 2**32.
    """

    front: int = 0
    number: int = 0

    @classmethod
    def first_of(cls, actor_id: str) -> "StepId":
        front = ActorId.parse(actor_id)
        return cls((front.index << 8 | front.restart & 0xFF) & 0xFFFF)

    def next(self) -> "StepId":
        return StepId(self.front, (self.number + 1) & 0xFFFFFFFF)

    def __str__(self) -> str:
        return f"{ActorId(None, *divmod(self.front, 256))}:{self.number}"


NO_STEP = StepId()
