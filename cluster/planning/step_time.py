"""How long a step takes: an analytical model over a hardware profile. Plain arithmetic, seconds throughout.

A front's step is, for each layer: its half (matrices, attention), an exchange over the lane, and what the slowest
group's replica computes; then the head, sampling and books. Matrices take the time in which their weights pass at the
speed that the profile has for that many rows; attention takes the longer of reading and multiplying.
"""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from cluster.models.spec import LayerSpec
from cluster.planning.cost import attention_cost, expert_weights, head_weights, layer_weights
from cluster.planning.hardware import HardwareProfile, speed_at
from cluster.planning.layout import Layout
from cluster.planning.workload import Batch, ServedModel
from cluster.policy.resources import NATIVE_SHARES

GATE_BYTES, ID_BYTES = 2, 2  # of each choice, in a dispatch
US = 1e-6


@dataclass(frozen=True, slots=True)
class StepSeconds:
    """A step of one front, by where its time goes; `waiting` is while experts, or cores, compute for other fronts."""

    front: float
    experts: float
    lane: float
    head: float
    waiting: float = 0.0

    @property
    def total(self) -> float:
        return self.front + self.experts + self.lane + self.head + self.waiting


@dataclass(frozen=True)
class StepModel:
    """Times of one model in one layout."""

    model: ServedModel
    layout: Layout

    @property
    def front_node(self) -> HardwareProfile:
        return self.layout.front_node

    @property
    def replica_node(self) -> HardwareProfile:
        return self.layout.front_node if self.layout.is_local else self.layout.replica_node

    def step(self, batch: Batch, others: Batch | None = None) -> StepSeconds:
        """A step, while all other fronts compute steps of `others`; None: steps like it."""
        layers = self._num_expert_layers
        front, head = self.front_half(batch), self.head(batch.sequences) + self.books(batch.sequences)
        answer, lane = layers * self.answer(batch.tokens), layers * self.lane(batch.tokens)
        return StepSeconds(front, answer, lane, head, self._waiting(others or batch))

    def _waiting(self, others: Batch) -> float:
        """Of a step, for what other fronts have asked of replicas, or of the cores of a shared machine."""
        number = self.layout.fronts - 1
        if not number or not others.tokens or (self.layout.is_local and not self.layout.is_shared):
            return 0.0
        layers, answer = self._num_expert_layers, self.answer(others.tokens)
        own = self.front_half(others) + self.head(others.sequences) + self.books(others.sequences)
        busy = min(1.0, others.tokens)  # with fewer tokens than one, a front computes now and then
        if self.layout.is_shared:
            return busy * number * (own + layers * answer)
        servers = self.layout.replicas
        queue = queue_length(number, own / layers + self.lane(others.tokens), answer, servers)
        return busy * layers * queue * answer / servers

    def front_half(self, batch: Batch) -> float:
        """A front's half of all layers: attention, router, and MLPs of its own."""
        node, spec = self.front_node, self.model.spec
        matrices = self._matrices * self.model.itemsize / speed_at(node.linears, batch.tokens)
        overhead = US * spec.num_layers * node.overheads.layer_us
        decodes = batch.decodes * self._attention(1, batch.context) if batch.decodes else 0.0
        prompts = self._attention(batch.prompt_tokens, batch.prompt_context) if batch.prompt_tokens else 0.0
        return matrices + decodes + prompts + overhead

    def answer(self, num_tokens: float) -> float:
        """What the slowest group's replica takes for one layer of a batch of so many tokens."""
        use, spec = self.model.experts, self.model.spec
        touched = use.touched(num_tokens)
        rows = num_tokens * spec.top_k / touched
        weights = self._share(touched, num_tokens) * expert_weights(spec) * self.model.itemsize
        overhead = 0.0 if self.layout.is_local else US * self.replica_node.overheads.dispatch_us
        return weights / speed_at(self.replica_node.experts, rows) + overhead

    def _share(self, touched: float, num_tokens: float) -> float:
        """Of the experts of a layer that have tokens, those that a step waits for. Replicas that share a machine take
        all its cores for all of them, unless the busiest one has not enough threads for that.
        """
        groups, layout = self.layout.groups, self.layout
        if layout.is_local:
            return touched
        busiest = touched / groups * self.model.experts.imbalance(num_tokens, groups)
        if not layout.is_shared:
            return min(self.model.spec.num_experts / groups, busiest)
        cores = self.replica_node.cores
        threads = max(1, min(cores, NATIVE_SHARES * cores // layout.num_replicas))  # as plan_resources gives them
        return max(touched, busiest * cores / threads)

    def lane(self, num_tokens: float) -> float:
        """Dispatch and combine of one layer, without the arithmetic."""
        if self.layout.lane == "local":
            return 0.0
        spec, groups = self.model.spec, self.layout.groups
        reached = self.model.experts.reached(1, groups)
        asked = groups * (1 - (1 - reached) ** num_tokens)
        message = 2 * spec.hidden_size * self.model.itemsize + spec.top_k * (GATE_BYTES + ID_BYTES)
        return self.front_node.lane(self.layout.lane).seconds(asked, groups * reached * num_tokens * message)

    def head(self, num_rows: float) -> float:
        """Logits of so many sequences."""
        weights = head_weights(self.model.spec) * self.model.itemsize
        return weights / speed_at(self.front_node.linears, num_rows)

    def books(self, num_sequences: float) -> float:
        """To schedule a step, to sample, and to hand tokens on."""
        overheads = self.front_node.overheads
        return US * (overheads.step_us + num_sequences * overheads.sequence_us)

    @cached_property
    def _num_expert_layers(self) -> int:
        return self.model.spec.num_expert_layers

    @cached_property
    def _matrices(self) -> int:
        """Numbers in a front's matrices of all layers."""
        return sum(layer_weights(self.model.spec, layer) for layer in self.model.spec.layers)

    @cached_property
    def _kinds(self) -> Counter[int | None]:
        """How many layers have which window."""
        return Counter(layer.window for layer in self.model.spec.layers)

    def _attention(self, new: float, context: float) -> float:
        """Of one sequence, over all layers."""
        speed, seconds = self.front_node.attention, 0.0
        for window, count in self._kinds.items():
            cost = attention_cost(self.model.spec, LayerSpec(window=window), new, context, self.model.itemsize)
            seconds += count * max(cost.num_bytes / (1e9 * speed.gb_per_second), cost.flops / (1e12 * speed.tflops))
        return seconds


def queue_length(customers: int, think: float, service: float, servers: int) -> float:
    """Dispatches that one more finds before it, waiting or in service, when so many fronts ask in turn after they have
    thought: mean value analysis of a closed queue (Reiser and Lavenberg, 1980), several servers as in Seidmann et al.
    (1987). Service times are taken as random: steady ones wait less.
    """
    demand, delay = service / servers, service * (servers - 1) / servers
    queue = 0.0
    for number in range(1, customers + 1):
        seconds = demand * (1 + queue)
        queue = number * seconds / (think + delay + seconds)
    return queue
