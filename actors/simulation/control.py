"""The supervisor in virtual time: it notices the dead, starts successors, scales, and rebalances."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from cluster.control.autoscaler import PERIOD_S, POLICY
from cluster.control.members import FIRST_PAUSE_S
from cluster.control.rebalancing import MIB, most_loaded
from cluster.control.reports import HUNG_S
from cluster.control.watch import WATCH_PERIOD_S
from cluster.planning.memory import front_weights, replica_weights
from cluster.policy.autoscaling import FrontSignals, GroupSignals, Limits, ScalingState, scale_fronts, scale_group
from cluster.policy.expert_load import NUM_STEPS
from cluster.policy.placement import RebalancePlan, plan_rebalance

if TYPE_CHECKING:
    from actors.simulation.simulation import Simulation

# Ray tells of a process that has been killed after about so long.
RAY_NOTICES_S = 1.5
BALANCE_PERIOD_S = 60.0


class Control:
    def __init__(self, simulation: "Simulation") -> None:
        self._simulation = simulation
        self._timeline, self._config = simulation.timeline, simulation.options.config
        self._replicas, self._experts = simulation.replicas, simulation.experts
        layout, config = simulation.options.layout, self._config
        self._wanted = [layout.replicas] * layout.groups
        self._wanted_fronts, self._starting_fronts = layout.fronts, 0
        self._front_limits = Limits(config.min_fronts, max(config.max_fronts, layout.fronts))
        self._limits = Limits(config.min_replicas, max(config.max_replicas, layout.replicas))
        self._states: dict[int | None, ScalingState] = {}
        self._busy_seconds = self._num_tokens = 0.0
        self._cost, self._priced_at = 0.0, 0.0
        self._is_moving = False

    def log(self, what: str) -> None:
        self._simulation.outcome.events.append((self._timeline.now, what))

    def start(self) -> None:
        self._every(self._config.load_window_s / NUM_STEPS, self._see_load)
        self._every(BALANCE_PERIOD_S, self._note_balance)
        if self._config.autoscale and not self._simulation.options.layout.is_local:
            self._every(PERIOD_S, self._autoscale)
        if self._config.rebalance_interval_s:
            self._every(self._config.rebalance_interval_s, self._rebalance)

    def _every(self, seconds: float, act: "Callable[[], None]") -> None:
        def again() -> None:
            if not self._simulation.is_over:
                act()
                self._timeline.after(seconds, again)

        self._timeline.after(seconds, again)

    def close(self) -> None:
        self._pay()
        layout = self._simulation.options.layout
        self._simulation.outcome.cost = None if layout.cost_per_hour is None else self._cost
        fronts = self._simulation.fronts.values()
        self._simulation.outcome.num_preempted += sum(f.scheduler.num_preemptions for f in fronts)

    def _pay(self) -> None:
        """For all devices that are there, up to now."""
        layout, hours = self._simulation.options.layout, (self._timeline.now - self._priced_at) / 3600
        self._priced_at = self._timeline.now
        fronts = len(self._simulation.fronts) + self._starting_fronts
        replicas = len(self._replicas.everyone()) + self._replicas.starting.total()
        prices = layout.front_node.cost_per_hour or 0.0, layout.replica_node.cost_per_hour or 0.0
        self._cost += hours * (fronts * prices[0] + replicas * prices[1])

    def lose_replicas(self, names: list[str], is_silent: bool) -> None:
        """All at once, as the processes of a node."""
        self._pay()
        lost = [self._replicas.lose(name, is_silent) for name in names]
        for front in self._simulation.fronts.values():
            front.feel(lost)
        noticed = (HUNG_S if is_silent else RAY_NOTICES_S) + WATCH_PERIOD_S
        for each in lost:
            self.log(f"{each.replica_id} {'falls silent' if is_silent else 'is killed'}")
            self._timeline.after(noticed, lambda each=each: self._bury(each.replica_id, each.group))  # type: ignore[misc]

    def _bury(self, name: str, group: int) -> None:
        """The next map is without it."""
        del self._replicas.gone[name]
        for front in self._simulation.fronts.values():
            front.breaker.keep_only(set(self._replicas.gone))
        self._timeline.after(FIRST_PAUSE_S, lambda: self._fill(group))

    def _fill(self, group: int) -> None:
        """Start what a group lacks."""
        self._pay()
        there = len(self._replicas.by_group[group]) + self._replicas.starting[group]
        options = self._simulation.options
        seconds = self._load_seconds(replica_weights(options.model, options.layout))
        for _ in range(self._wanted[group] - there):
            self._replicas.starting[group] += 1
            self._timeline.after(seconds, lambda: self._join(group))

    def _join(self, group: int) -> None:
        self._replicas.starting[group] -= 1
        if len(self._replicas.by_group[group]) < self._wanted[group]:
            self.log(f"{self._replicas.join(group)} serves")
            self._simulation.changed()

    def _load_seconds(self, num_bytes: float) -> float:
        options = self._simulation.options
        return options.start_s + num_bytes / (1e9 * options.load_gb_per_second)

    def lose_front(self, name: str, is_silent: bool = False) -> None:
        """What it had is replayed once ingresses notice: prompt and what was emitted are computed again elsewhere."""
        self._pay()
        simulation = self._simulation
        front = simulation.fronts.pop(name)
        lost = front.end()
        simulation.outcome.num_preempted += front.scheduler.num_preemptions
        simulation.changed()
        self.log(f"{name} {'falls silent' if is_silent else 'is killed'}, with {len(lost)} requests")
        noticed = HUNG_S if is_silent else RAY_NOTICES_S

        def replay() -> None:
            for sequence, request in lost:
                simulation.outcome.num_replayed += 1
                name = sequence.request.request_id
                simulation.place(name, request, sequence.num_prompt, sequence.num_output, is_replay=True)

        self._timeline.after(noticed, replay)
        self._timeline.after(noticed + WATCH_PERIOD_S + FIRST_PAUSE_S, self._fill_fronts)

    def _fill_fronts(self) -> None:
        self._pay()
        options = self._simulation.options
        seconds = self._load_seconds(front_weights(options.model, options.layout))
        for _ in range(self._wanted_fronts - len(self._simulation.fronts) - self._starting_fronts):
            self._starting_fronts += 1
            self._timeline.after(seconds, self._join_front)

    def _join_front(self) -> None:
        self._starting_fronts -= 1
        self._simulation.add_front()
        self.log("a front serves")

    def _see_load(self) -> None:
        tokens, self._num_tokens = self._replicas.num_tokens - self._num_tokens, self._replicas.num_tokens
        self._experts.see(tokens, self._timeline.now)

    def _note_balance(self) -> None:
        self._simulation.outcome.balancedness.append((self._timeline.now, self._experts.balancedness))

    def _autoscale(self) -> None:
        busy, self._busy_seconds = self._replicas.busy_seconds - self._busy_seconds, self._replicas.busy_seconds
        for group, share in enumerate(self._experts.shares):
            ready = len(self._replicas.by_group[group])
            utilisation = min(1.0, busy * share / PERIOD_S / max(1, ready))
            signals = GroupSignals(utilisation, self._wanted[group], ready)
            decision = scale_group(signals, self._limits, self._state(group), self._timeline.now, POLICY)
            self._states[group] = decision.state
            self._want(group, decision.desired, decision.reason)
        self._autoscale_fronts()

    def _state(self, group: int | None) -> ScalingState:
        return self._states.get(group, ScalingState())

    def _want(self, group: int, desired: int, reason: str) -> None:
        before = self._wanted[group]
        if desired == before:
            return
        self._wanted[group] = desired
        self.log(f"group {group}: {before} -> {desired} replicas: {reason}")
        self._fill(group)
        while len(self._replicas.by_group[group]) > desired:
            self._replicas.leave(group)
            self._simulation.changed()

    def _autoscale_fronts(self) -> None:
        fronts = list(self._simulation.fronts.values())
        waits = [wait for front in fronts for wait in front.queue_waits]
        for front in fronts:
            front.queue_waits.clear()
        signals = FrontSignals(
            queue_wait_s=sum(waits) / len(waits) if waits else 0.0,
            num_waiting=sum(len(front.scheduler.waiting) for front in fronts),
            num_running=sum(len(front.scheduler.running) for front in fronts),
            max_num_seqs=self._config.max_num_seqs,
            fronts=self._wanted_fronts,
            ready=len(fronts),
        )
        decision = scale_fronts(signals, self._front_limits, self._state(None), self._timeline.now, POLICY)
        self._states[None] = decision.state
        if decision.desired > self._wanted_fronts:
            self.log(f"fronts: {self._wanted_fronts} -> {decision.desired}: {decision.reason}")
            self._wanted_fronts = decision.desired
            self._fill_fronts()

    def _rebalance(self) -> None:
        if self._is_moving:
            return
        options, spec = self._simulation.options, self._simulation.options.model.spec
        plan = plan_rebalance(
            self._experts.load.recent,
            self._experts.homes,
            slots_per_layer=spec.num_experts + self._config.redundant_experts,
            bytes_per_expert=options.model.sizes.experts // (spec.num_experts * spec.num_expert_layers),
            replicas=[len(replicas) for replicas in self._replicas.by_group],
            threshold=self._config.rebalance_threshold,
        )
        if plan.is_worthwhile:
            self._is_moving = True
            self._timeline.after(self._moving_seconds(plan), lambda: self._moved(plan))

    def _moving_seconds(self, plan: RebalancePlan) -> float:
        """Layer by layer, all replicas side by side."""
        model, bound = self._simulation.options.model, self._config.rebalance_mib_per_s
        per_expert = model.sizes.experts / (model.spec.num_experts * model.spec.num_expert_layers)
        speed = 1e9 * self._simulation.options.load_gb_per_second
        return most_loaded(plan).total() * per_expert / (min(speed, MIB * bound) if bound else speed)

    def _moved(self, plan: RebalancePlan) -> None:
        self._is_moving = False
        self._experts.move(plan.homes)
        self._simulation.changed()
        self.log(f"rebalanced: {plan.before:.3f} -> {plan.after:.3f}, {len(plan.moves)} experts moved")
