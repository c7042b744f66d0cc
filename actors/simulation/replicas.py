"""The expert replicas in virtual time: who lives, who is dead and not yet known to be, and how long steps then take."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace

from actors.simulation.expert_traffic import ExpertTraffic
from actors.simulation.front import Lost, Timed
from cluster.actor_id import ActorId
from cluster.planning.layout import Layout
from cluster.planning.step_time import StepModel
from cluster.planning.workload import Batch, ServedModel


class Replicas:
    """`num_fronts` tells how many fronts compute."""

    def __init__(
        self, model: ServedModel, layout: Layout, experts: ExpertTraffic, num_fronts: Callable[[], int]
    ) -> None:
        self.model, self.layout, self.experts = model, layout, experts
        there = 0 if layout.is_local else layout.replicas
        self.by_group: list[list[str]] = [
            [str(ActorId(group, index)) for index in range(there)] for group in range(layout.groups)
        ]
        self.starting: Counter[int] = Counter()
        self.gone: dict[str, Lost] = {}
        self.busy_seconds = 0.0  # of the busiest group: what its replicas have computed
        self.num_tokens = 0.0
        self._num_created = [layout.replicas] * layout.groups
        self._num_fronts = num_fronts
        self._num_layers = model.spec.num_expert_layers
        self._timed: dict[tuple[int, int, int, int], Timed] = {}
        self._model = self._model_now()

    def change(self) -> None:
        """Somebody has come or gone, or experts have moved: steps take another time."""
        self._timed.clear()
        self._model = self._model_now()

    def _model_now(self) -> StepModel:
        """A group counts by the load that it has: two replicas for half of the load are four."""
        living = (len(r) / share for r, share in zip(self.by_group, self.experts.shares, strict=True) if r)
        least = int(min(living, default=1))
        return StepModel(self.model, replace(self.layout, fronts=max(1, self._num_fronts()), replicas=max(1, least)))

    def timed(self, batch: Batch) -> Timed:
        """A step; batches that differ little take the same."""
        decodes, context = round(batch.decodes), round(batch.context / 64)
        key = decodes, context, round(batch.prompt_tokens / 16), round(batch.prompt_context / 64)
        if key not in self._timed:
            prompt_tokens = 16 * key[2] if key[2] else batch.prompt_tokens
            self._timed[key] = self._time(Batch(decodes, 64 * context, prompt_tokens, 64 * key[3]))
        return self._timed[key]

    def _time(self, batch: Batch) -> Timed:
        step = self._model.step(batch)
        experts = (step.experts + step.waiting) / self.experts.balancedness
        seconds = step.front + experts + step.lane + step.head + self._computed_in_front(batch)
        return Timed(seconds, step.experts / self.experts.balancedness)

    def _computed_in_front(self, batch: Batch) -> float:
        """What groups without a replica would have computed: the front's device does it, after all that is its own."""
        empty = sum(not replicas for replicas in self.by_group)
        if self.layout.is_local or not empty:
            return 0.0
        local = StepModel(self.model, replace(self.layout, lane="local", groups=1))
        return empty / self.layout.groups * self._num_layers * local.answer(batch.tokens)

    def answer_seconds(self, num_tokens: float) -> float:
        return self._model.lane(num_tokens) + self._model.answer(num_tokens) / self.experts.balancedness

    def note(self, batch: Batch, timed: Timed, steps: int) -> int:
        self.busy_seconds += steps * timed.experts
        self.num_tokens += steps * batch.tokens
        return steps * self._num_layers * self.layout.groups

    def lost(self) -> Iterable[Lost]:
        return tuple(self.gone.values())

    def living(self, group: int) -> list[str]:
        return self.by_group[group]

    def everyone(self) -> list[str]:
        return [replica for replicas in self.by_group for replica in replicas]

    def on_node(self, node: int) -> list[str]:
        """Replicas of a group are on different nodes, as far as there are any."""
        size, groups = self.layout.replica_node.devices, self.layout.groups
        placed = ((r, ActorId.parse(r)) for r in self.everyone())
        return [name for name, i in placed if (i.index * groups + (i.group or 0)) // size == node]

    @property
    def num_nodes(self) -> int:
        return -(-self.layout.num_replicas // self.layout.replica_node.devices)

    def lose(self, replica_id: str, is_silent: bool) -> Lost:
        group = ActorId.parse(replica_id).group or 0
        self.by_group[group].remove(replica_id)
        lost = self.gone[replica_id] = Lost(replica_id, group, is_silent)
        self.change()
        return lost

    def join(self, group: int) -> str:
        """A new replica, which has loaded."""
        name = str(ActorId(group, self._num_created[group]))
        self._num_created[group] += 1
        self.by_group[group].append(name)
        self.change()
        return name

    def leave(self, group: int) -> str:
        """The youngest; it drains within a step."""
        name = self.by_group[group].pop()
        self.change()
        return name
