"""A cluster in virtual time: requests come, fronts step, replicas die, and control does what it does.

Decisions are the project's own: scheduler, failover, placement and autoscaling. What takes time is told by the model of
a step (cluster/planning), and by what starting and loading take (Options).
"""

import itertools
import random
from collections.abc import Iterator

from actors.simulation.control import Control
from actors.simulation.expert_traffic import ExpertTraffic
from actors.simulation.failures import Failure
from actors.simulation.front import Front, new_scheduler
from actors.simulation.options import Options
from actors.simulation.outcome import Outcome, Request
from actors.simulation.replicas import Replicas
from actors.simulation.timeline import Timeline
from actors.simulation.traffic import Arrival
from cluster.planning.memory import GIB, USABLE, kv_bytes

CPU_BLOCK, GPU_BLOCK = 16, 256
# An ingress keeps a request for so long while no front is there, and asks again so often.
FRONT_WAIT_S, ASK_AGAIN_S = 60.0, 1.0


class Simulation:
    def __init__(self, options: Options) -> None:
        self.options = options
        self.timeline = Timeline()
        self.outcome = Outcome()
        self.dice = random.Random(options.seed)
        config = options.config
        self.experts = ExpertTraffic(
            options.model.spec, options.model.experts, options.layout.groups, config.load_window_s, options.spread,
            options.seed,
        )  # fmt: skip
        self.fronts: dict[str, Front] = {}
        self.replicas = Replicas(options.model, options.layout, self.experts, lambda: len(self.fronts))
        self._block = config.block_size or (CPU_BLOCK if options.layout.front_node.device == "cpu" else GPU_BLOCK)
        self._num_blocks = max(1, int(_cache(options) // (self._block * options.model.sizes.kv_per_token)))
        self._front_numbers = itertools.count()
        self._names = itertools.count()
        for _ in range(options.layout.fronts):
            self.add_front()
        self.control = Control(self)

    def run(self) -> Outcome:
        arrivals = self.options.arrivals()
        self._next(arrivals)
        self.control.start()
        for failure in self.options.failures:
            self.timeline.at(failure.at, lambda failure=failure: self._fail(failure))  # type: ignore[misc]
        self.timeline.run()
        self.outcome.seconds = max(self.options.seconds, self.timeline.now)
        self.control.close()
        return self.outcome

    @property
    def is_over(self) -> bool:
        """No request is under way, and none will come."""
        done = self.outcome.num_finished + self.outcome.num_refused == self.outcome.num_requests
        return done and self.timeline.now >= self.options.seconds

    def _next(self, arrivals: Iterator[Arrival]) -> None:
        if (arrival := next(arrivals, None)) is None:
            return

        def arrive() -> None:
            self._arrive(arrival)
            self._next(arrivals)

        self.timeline.at(arrival.at, arrive)

    def _arrive(self, arrival: Arrival) -> None:
        self.outcome.num_requests += 1
        longest = min(self.options.config.max_model_len or self.options.model.spec.max_context, self._room)
        if arrival.input_len + arrival.output_len > longest:
            self.outcome.num_refused += 1
            return
        request, name = Request(self.timeline.now, arrival.output_len), str(next(self._names))
        at_front = self.timeline.now + self.options.layout.front_node.http.request_ms / 1000
        self.timeline.at(at_front, lambda: self.place(name, request, arrival.input_len))

    @property
    def _room(self) -> int:
        return self._num_blocks * self._block

    def place(self, name: str, request: Request, prompt_len: int, emitted: int = 0, is_replay: bool = False) -> None:
        """To the front with the least outstanding tokens that has room for one more to wait; what another has lost was
        admitted already.
        """
        most = self.options.config.max_num_waiting
        for front in sorted(self.fronts.values(), key=lambda front: front.outstanding):
            if is_replay or len(front.scheduler.waiting) < most:
                front.take(name, request, prompt_len, emitted)
                return
        if self.fronts or self.timeline.now - request.arrived > FRONT_WAIT_S:
            self.outcome.num_refused += 1
            return
        self.timeline.after(ASK_AGAIN_S, lambda: self.place(name, request, prompt_len, emitted, is_replay))

    def add_front(self) -> None:
        options, config = self.options, self.options.config
        scheduler = new_scheduler(
            self._num_blocks, self._block, config.max_num_batched_tokens, config.max_num_seqs,
            config.max_model_len or options.model.spec.max_context,
        )  # fmt: skip
        name = f"front-{next(self._front_numbers)}"
        self.fronts[name] = Front(name, scheduler, self.timeline, self.replicas, self.outcome, options.hedge_share)
        self.changed()

    def changed(self) -> None:
        """Steps take another time from now on: those that run end, and no more of their kind begin."""
        self.replicas.change()
        for front in self.fronts.values():
            front.cut()

    def _fail(self, failure: Failure) -> None:
        if failure.kind == "hot expert":
            self.experts.heat()
            self.changed()
            self.control.log("an expert of each layer is hot")
        elif failure.kind == "fronts":
            for name in self.dice.sample(sorted(self.fronts), min(failure.count, len(self.fronts))):
                self.control.lose_front(name)
        elif failure.kind == "replicas":
            everyone = self.replicas.everyone()  # none on the lane `local`
            killed = self.dice.sample(everyone, min(failure.count, len(everyone)))
            self.control.lose_replicas(killed, is_silent=False)
        else:
            self._lose_node()

    def _lose_node(self) -> None:
        """One of the expert replicas; on the lane `local`, where there are none, one of the fronts."""
        layout = self.options.layout
        if layout.is_local:
            size = layout.front_node.devices
            first = size * self.dice.randrange(-(-len(self.fronts) // size))
            for name in sorted(self.fronts)[first : first + size]:
                self.control.lose_front(name, is_silent=True)
            return
        node = self.dice.randrange(self.replicas.num_nodes)
        self.control.log(f"node {node} is lost")
        self.control.lose_replicas(self.replicas.on_node(node), is_silent=True)


def _cache(options: Options) -> float:
    """Bytes of a front's KV cache."""
    if options.config.kv_cache_gib is not None:
        return options.config.kv_cache_gib * GIB
    return kv_bytes(options.model, options.layout) * options.config.gpu_memory_utilization / USABLE
