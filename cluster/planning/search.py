"""Which layouts a model can have on some hardware, and how each would serve some traffic: the best first. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from cluster.planning.hardware import HardwareProfile
from cluster.planning.layout import Layout, PlannedLane, lane_between
from cluster.planning.memory import most_sequences
from cluster.planning.steady_state import Operation, Serving
from cluster.planning.workload import Goals, ServedModel, Traffic

MAX_ACTORS = 256  # of a kind, as ClusterConfig has it
# Up to so many actors of a kind each number is tried; beyond, each is half as much again: plans that differ by one
# actor in fifty differ by less than the model errs, and there would be hundreds of thousands.
EACH_TRIED = 32


@dataclass(frozen=True, slots=True)
class Fleet:
    """So many devices of a kind."""

    node: HardwareProfile
    devices: int


@dataclass(frozen=True, slots=True)
class Busy:
    """Shares: of a front's time, of a replica's, of a front's KV cache."""

    front: float
    experts: float
    kv_cache: float


@dataclass(frozen=True, slots=True)
class Plan:
    """A layout, what clients see at the traffic that is asked for, and how much it bears within the goals. `left`:
    requests per second that are still borne when any one actor, or any one node, is lost; 0 if something is missing
    then. `holds`: all goals are met at the traffic, also after as many losses as must be survived.
    """

    layout: Layout
    traffic: Traffic
    now: Operation
    most: Operation
    left_without_actor: float
    left_without_node: float
    holds: bool
    most_running: int

    @property
    def tokens_per_second(self) -> float:
        """New tokens, at most, within the goals."""
        return self.most.rate * self.traffic.output_len

    @property
    def cost_per_million_tokens(self) -> float | None:
        """Of new tokens, at the traffic that is asked for. None without prices."""
        per_hour = self.layout.cost_per_hour
        return None if per_hour is None else 1e6 * per_hour / (3600 * self.now.rate * self.traffic.output_len)

    @property
    def busy(self) -> Busy:
        """At the traffic that is asked for."""
        step, layout = self.now.step, self.layout
        computing = min(1.0, self.now.running)  # with fewer sequences than one, a front computes now and then
        servers = 1 if layout.is_local or layout.is_shared else layout.replicas
        experts = layout.fronts * step.experts / servers if not layout.is_local else step.experts
        return Busy(
            computing * (step.front + step.head) / step.total,
            min(1.0, computing * experts / step.total),
            self.now.running / self.most_running,
        )


def numbers(most: int) -> list[int]:
    """Of actors of a kind, of which there can be so many."""
    most = min(most, MAX_ACTORS)
    if most <= EACH_TRIED:
        return list(range(1, most + 1))
    found = list(range(1, 9))
    while found[-1] < most:
        found.append(min(most, found[-1] * 3 // 2))
    return found


def layouts(model: ServedModel, fleets: Sequence[Fleet], lane: PlannedLane | None = None) -> Iterator[Layout]:
    """All that fit into memory. `lane`: only those over it; None: the best one for each."""
    for fleet in fleets:
        yield from _local(fleet, lane)
    for fronts, experts in product(fleets, repeat=2):
        yield from _apart(model, fronts, experts, lane)


def _local(fleet: Fleet, lane: PlannedLane | None) -> Iterator[Layout]:
    """Fronts that have all experts, each on a device of its own."""
    if lane in (None, "local"):
        for fronts in numbers(fleet.devices):
            is_shared = fleet.node.device == "cpu" and fronts == 1
            yield Layout(fronts, 1, 1, "local", fleet.node, fleet.node, is_shared)


def _apart(model: ServedModel, fronts: Fleet, experts: Fleet, lane: PlannedLane | None) -> Iterator[Layout]:
    if lane == "local":
        return
    is_same = fronts.node.name == experts.node.name
    groups = [n for n in range(1, model.spec.num_experts + 1) if model.spec.num_experts % n == 0]
    for group, replicas in product(groups, numbers(experts.devices)):
        if group * replicas > experts.devices - is_same:
            continue
        most = fronts.devices - (group * replicas if is_same else 0)
        for number in numbers(most):
            chosen = lane or lane_between(fronts.node, experts.node, number + group * replicas)
            yield Layout(number, group, replicas, chosen, fronts.node, experts.node)
    if is_same and fronts.node.device == "cpu":
        for group in groups[:4]:
            yield Layout(1, group, 1, lane or "unix", fronts.node, fronts.node, is_shared=True)


@dataclass(frozen=True)
class Judge:
    """What layouts are worth to a model under some traffic. Losing an actor leads from one layout to another one, so
    what a layout bears is worked out once.
    """

    model: ServedModel
    traffic: Traffic
    goals: Goals
    _most: dict[Layout, Operation] = field(default_factory=dict, repr=False)

    def __call__(self, layout: Layout) -> Plan:
        serving = Serving(self.model, layout, self.traffic)
        now = serving.under(self.goals)
        one, node = self._left(layout.after_actors()), self._left(layout.after_node())
        lost = self.goals.survive
        survives = lost == 0 or (one if lost == 1 else self._left(layout.after_actors(lost))) >= now.rate
        holds = not now.limit and survives
        return Plan(layout, self.traffic, now, self.most(layout), one, node, holds, serving.most_running)

    def most(self, layout: Layout) -> Operation:
        """At the most traffic that it bears within the goals."""
        if layout not in self._most:
            self._most[layout] = Serving(self.model, layout, self.traffic).capacity(self.goals)
        return self._most[layout]

    def _left(self, kept: tuple[Layout | None, ...]) -> float:
        """Requests per second that the worst of these still bears."""
        return min(0.0 if each is None else self.most(each).rate for each in kept)


def search(
    model: ServedModel, fleets: Sequence[Fleet], traffic: Traffic, goals: Goals, lane: PlannedLane | None = None
) -> list[Plan]:
    """Every layout that fits, judged: those that hold first, of these the cheapest (without prices: the fewest
    devices), then those that bear most. A rate of `traffic` is given, or what each layout makes of a number at a time.
    """
    judge = Judge(model, traffic, goals)
    fitting = (each for each in layouts(model, fleets, lane) if most_sequences(model, each, traffic.length))
    return sorted(map(judge, fitting), key=_rank)


def _rank(plan: Plan) -> tuple[bool, float, float]:
    price = plan.layout.cost_per_hour
    devices = float(sum(plan.layout.num_devices.values()))
    # What does not hold is judged by how much it bears alone.
    return not plan.holds, (devices if price is None else price) if plan.holds else 0.0, -plan.most.rate


def pareto(plans: Sequence[Plan], model: ServedModel, goals: Goals) -> list[tuple[float, float]]:
    """(seconds between tokens, new tokens per second): the most that any of these layouts bears, by how long clients
    wait for a token at most, from a quarter of the goal to four times of it.
    """
    points = []
    for number in range(-4, 5):
        judge = Judge(model, plans[0].traffic, replace(goals, tpot_s=goals.tpot_s * 2 ** (number / 2)))
        rate = max(judge.most(plan.layout).rate for plan in plans)
        points.append((judge.goals.tpot_s, rate * plans[0].traffic.output_len))
    return points
