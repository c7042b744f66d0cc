"""What clients see of a layout under steady traffic, and how much traffic it bears.

Fronts share the requests evenly. A front's steps compute a token for each running sequence, and some also a piece of a
prompt; how many sequences run follows from how long steps take (Little, 1961), so both are found together. A prompt
waits for those before it as in a queue with random arrivals and equal service (M/D/1).
"""

from dataclasses import dataclass, replace
from functools import cached_property

from cluster.planning.layout import Layout
from cluster.planning.memory import most_sequences
from cluster.planning.step_time import StepModel, StepSeconds
from cluster.planning.workload import Batch, Goals, ServedModel, Traffic

# As ClusterConfig and the engine's step budget have them.
MAX_NUM_SEQS, STEP_TOKENS, LEAST_STEP_TOKENS, STEP_TARGET_S = 256, 512, 96, 0.25
ROUNDS, CLOSE = 200, 1e-3
# More requests per second than anything here serves: where the search for the most begins.
MANY = 1e5


@dataclass(frozen=True, slots=True)
class Operation:
    """A layout at work. Seconds; `running` sequences are those of one front. `limit` says what is exceeded, if anything
    is; then the other figures are those of the last state that was tried.
    """

    rate: float
    ttft_s: float
    tpot_s: float
    running: float
    step: StepSeconds
    prompt_share: float
    http_cores: float
    limit: str = ""


@dataclass(frozen=True)
class Serving:
    model: ServedModel
    layout: Layout
    traffic: Traffic

    @cached_property
    def steps(self) -> StepModel:
        return StepModel(self.model, self.layout)

    @cached_property
    def most_running(self) -> int:
        """Sequences that a front may run at once."""
        return min(MAX_NUM_SEQS, most_sequences(self.model, self.layout, self.traffic.length))

    def step_tokens(self, running: float) -> int:
        """Tokens of a step, as a front without a setting finds them: what fits the target time beside running ones."""
        if (number := round(running)) not in self._step_tokens:
            self._step_tokens[number] = self._fitting(number)
        return self._step_tokens[number]

    def at(self, rate: float) -> Operation:
        """With so many requests per second over all fronts."""
        if not self.most_running:
            return Operation(rate, 0, 0, 0, StepSeconds(0, 0, 0, 0), 0, 0, limit="memory")
        mine, prompt = rate / self.layout.fronts, self.traffic.input_len
        tpot, running, share = self._step(1, 0).total, 0.0, 0.0
        for _ in range(ROUNDS):
            running = mine * self.traffic.output_len * tpot
            if running > self.most_running:
                what = "KV cache" if self.most_running < MAX_NUM_SEQS else "sequences"
                return self._operation(rate, tpot, running, 1.0, what)
            room, pieces = self._room(running)
            piece = min(room, max(prompt / pieces, mine * prompt * tpot))
            share = mine * prompt * tpot / piece
            if share > 1:
                break
            plain, full = (self._step(running, each, share * piece).total for each in (0, piece))
            found = (1 - share) * plain + share * full + self._http(running)
            if abs(found - tpot) <= CLOSE * tpot:
                return self._operation(rate, found, running, share, "")
            tpot = (tpot + found) / 2
        return self._operation(rate, tpot, running, min(1.0, share), "prompts")

    def _room(self, running: float) -> tuple[float, int]:
        """Prompt tokens that fit into a step beside running sequences, and the steps that a prompt takes."""
        room = max(1.0, self.step_tokens(running) - running)
        return room, int(-(-self.traffic.input_len // room))

    def _operation(self, rate: float, tpot: float, running: float, share: float, limit: str) -> Operation:
        room, pieces = self._room(running)
        piece = self.traffic.input_len / pieces
        step = self._step(running, piece, share * piece)
        reading = pieces * step.total
        used = min(0.999, rate / self.layout.fronts * self.traffic.input_len / room * step.total)
        waiting = used / (2 * (1 - used)) * reading + tpot / 2
        http = 1e-3 * self.layout.front_node.http.request_ms
        cores = 1e-6 * self.layout.front_node.http.token_us * rate * self.traffic.output_len
        return Operation(rate, http + waiting + reading, tpot, running, step, share, cores, limit)

    def _step(self, running: float, piece: float, pieces_elsewhere: float = 0.0) -> StepSeconds:
        """With so many prompt tokens, while other fronts have `pieces_elsewhere` on average."""
        # A step has a token; fewer than one on average are steps that are not computed.
        mine, others = self._batch(max(1.0, running), piece), self._batch(running, pieces_elsewhere)
        return self.steps.step(mine, others)

    def _batch(self, running: float, piece: float) -> Batch:
        # On average a piece of a prompt has half of the others before it.
        context = (self.traffic.input_len + piece) / 2 if piece else 0.0
        return Batch(running, self.traffic.mean_context, piece, context)

    def _http(self, running: float) -> float:
        """How much longer a step takes because ingress and proxies have the cores of a shared machine meanwhile."""
        node = self.layout.front_node
        return 1e-6 * node.http.token_us * running * self.layout.fronts / node.cores if self.layout.is_shared else 0.0

    @cached_property
    def _step_tokens(self) -> dict[int, int]:
        return {}

    def _fitting(self, running: int) -> int:
        """As StepBudget finds it (actors/engine/step_budget.py): halved until it fits the target time."""
        low, high = LEAST_STEP_TOKENS, STEP_TOKENS
        if not running or self._step(running, high - running).total <= STEP_TARGET_S:
            return high
        while high - low > 8:
            middle = (low + high) // 2
            fits = self._step(running, max(0, middle - running)).total <= STEP_TARGET_S
            low, high = (middle, high) if fits else (low, middle)
        return low

    def under(self, goals: Goals) -> Operation:
        """At the traffic that is asked for; `limit` also names a goal that is missed."""
        return _judged(self.at(self.rate), goals)

    @property
    def rate(self) -> float:
        """Requests per second; a number at a time is kept up by clients that send the next one at once."""
        if self.traffic.rate is not None:
            return self.traffic.rate
        assert self.traffic.concurrency is not None
        low, high = 0.0, MANY
        while high - low > CLOSE * high:
            middle = (low + high) / 2
            found = self.at(middle)
            inside = middle * (found.ttft_s + (self.traffic.output_len - 1) * found.tpot_s)
            low, high = (low, middle) if found.limit or inside > self.traffic.concurrency else (middle, high)
        return low

    def capacity(self, goals: Goals) -> Operation:
        """At the most requests per second that hold the goals; rate 0 and a limit if none do."""
        least = _judged(self.at(1e-6), goals)
        if least.limit:
            return replace(least, rate=0.0)
        low, high = 1e-6, MANY
        best, limit = least, ""
        while high - low > 5e-3 * high:
            # Halved in logarithms: rates may be of any size.
            middle = (low * high) ** 0.5
            found = _judged(self.at(middle), goals)
            if found.limit:
                high, limit = middle, found.limit
            else:
                low, best = middle, found
        return replace(best, limit=limit)


def _judged(found: Operation, goals: Goals) -> Operation:
    if found.limit:
        return found
    for name, value, most in (("TPOT", found.tpot_s, goals.tpot_s), ("TTFT", found.ttft_s, goals.ttft_s)):
        if value > most:
            return replace(found, limit=name)
    return found
