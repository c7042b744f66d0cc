"""How actors are called: `front-0`, `expert-g1-r0`, and `expert-g1-r0.2` after the second restart.

A slot is a place in the cluster, such as `expert-g1-r0`. Each actor that fills it has an id of its own, so that nobody
takes a new actor for the one that was lost.
"""

import re
from dataclasses import dataclass

from cluster.messages.actors import ActorKind

_GRAMMAR = re.compile(r"(?:front-(?P<front>\d+)|expert-g(?P<group>\d+)-r(?P<replica>\d+))(?:\.(?P<restart>\d+))?")


@dataclass(frozen=True, slots=True)
class ActorId:
    """`index` counts fronts, and the replicas of a group; a front has no group."""

    group: int | None
    index: int
    restart: int = 0

    @classmethod
    def parse(cls, text: str) -> "ActorId":
        """Raises ValueError if that is no actor of ours."""
        match = _GRAMMAR.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} names no actor: front-0 or expert-g1-r0 would, and front-0.2 after restarts")
        restart = int(match["restart"] or 0)
        if match["front"]:
            return cls(None, int(match["front"]), restart)
        return cls(int(match["group"]), int(match["replica"]), restart)

    @property
    def kind(self) -> ActorKind:
        return "front" if self.group is None else "expert"

    @property
    def slot(self) -> str:
        return f"front-{self.index}" if self.group is None else f"expert-g{self.group}-r{self.index}"

    def __str__(self) -> str:
        return f"{self.slot}.{self.restart}" if self.restart else self.slot


def slot_of(actor_id: str) -> str:
    """The slot that an actor fills, of whatever name."""
    return actor_id.partition(".")[0]
