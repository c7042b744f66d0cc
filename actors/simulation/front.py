"""A front in virtual time: the engine's own scheduler decides what each step computes, the model of a step how long.

A run of steps in which nothing changes is one event: it ends when a sequence ends, or when it is cut because something
comes that the next step has to know of. Failover is the dispatcher's own rules: deadline, hedge budget, breaker.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from actors.dispatch.failover import Breaker, HedgeBudget, Latency
from actors.engine.kv_cache import BlockAllocator
from actors.engine.scheduler import Chunk, Scheduler
from actors.engine.sequence import Sequence
from actors.engine.step_budget import MEMORY
from actors.simulation.outcome import Outcome, Request, Stall
from actors.simulation.timeline import Event, Timeline
from cluster.messages.requests import GenerationRequest, SamplingParams
from cluster.planning.workload import Batch


class Steps(Protocol):
    """What a front asks of the cluster that it computes with."""

    def timed(self, batch: Batch) -> "Timed":
        """A step that computes the batch."""

    def answer_seconds(self, num_tokens: float) -> float:
        """From a dispatch of one layer to its answer."""

    def lost(self) -> "Iterable[Lost]":
        """Replicas that are dead and still in the expert map."""

    def living(self, group: int) -> list[str]: ...
    def note(self, batch: Batch, timed: "Timed", steps: int) -> int:
        """So many steps were computed; returns their messages."""


@dataclass(frozen=True, slots=True)
class Lost:
    replica_id: str
    group: int
    is_silent: bool


@dataclass(frozen=True, slots=True)
class Timed:
    """Seconds of a step, and what the busiest group's experts compute in it."""

    seconds: float
    experts: float


@dataclass(slots=True)
class Run:
    """Steps that compute the same chunks, one token further each; `extra` is what failover adds to the first."""

    chunks: list[Chunk]
    batch: Batch
    started: float
    timed: Timed
    steps: int
    event: Event
    extra: float = 0.0
    is_cut: bool = False

    @property
    def step_s(self) -> float:
        return self.timed.seconds

    @property
    def end(self) -> float:
        return self.started + self.extra + self.steps * self.step_s

    def done(self, now: float) -> int:
        """Steps that have ended."""
        return int(max(0.0, now - self.started - self.extra) / self.step_s)


class Front:
    """`steps` is what it computes with; what becomes of its requests goes to `outcome`."""

    def __init__(
        self, name: str, scheduler: Scheduler, timeline: Timeline, steps: Steps, outcome: Outcome, hedge_share: float
    ) -> None:
        self.name = name
        self.scheduler = scheduler
        self.breaker = Breaker(timeline.clock)
        self._owed = 0  # tokens that are still to come, when the run of steps began
        self.requests: dict[str, tuple[Sequence, Request]] = {}
        self.queue_waits: list[float] = []
        self._hedges = HedgeBudget(hedge_share)
        self._timeline, self._steps, self._outcome = timeline, steps, outcome
        self._run: Run | None = None

    @property
    def outstanding(self) -> int:
        """Tokens that are still to come, as ingresses see it: steps of a run that have ended count."""
        run = self._run
        return self._owed - (run.done(self._timeline.now) * len(run.chunks) if run and run.steps > 1 else 0)

    def take(self, name: str, request: Request, prompt_len: int, emitted: int = 0) -> None:
        """A request, or one that another front has lost after so many tokens."""
        params = SamplingParams(max_tokens=request.output_len, temperature=0.0)
        asked = GenerationRequest(name, "", zeros(prompt_len), params, zeros(emitted))
        sequence = Sequence(asked, [0] * (prompt_len + emitted), arrived=self._timeline.now)
        self.requests[name] = sequence, request
        self._owed += request.output_len - emitted
        self.scheduler.add(sequence)
        self.cut()
        if self._run is None:
            self._begin()

    def cut(self) -> None:
        """Whatever comes is for the next step: only the step that runs is still computed."""
        run = self._run
        if run is None or run.is_cut:
            return
        run.is_cut = True
        done = run.done(self._timeline.now)
        if done + 1 < run.steps:
            run.steps = done + 1
            self._plan_end(run)

    def feel(self, lost: Iterable[Lost]) -> None:
        """Replicas die while this front computes: messages of the step that runs were for them."""
        self.cut()
        if self._run is not None:
            self._run.extra += self._meet_all(lost, self._run.batch)
            self._plan_end(self._run)

    def end(self) -> list[tuple[Sequence, Request]]:
        """The process dies. Returns what it has lost."""
        if self._run:
            self._run.event.is_cancelled = True
        return list(self.requests.values())

    def _plan_end(self, run: Run) -> None:
        run.event.is_cancelled = True
        run.event = self._timeline.at(run.end, self._end_run)

    def _begin(self) -> None:
        """schedule, and compute as many steps as will be alike."""
        chunks = self.scheduler.schedule()
        if not chunks:
            self._run = None
            return
        batch = batch_of(chunks)
        extra = self._meet_all(self._steps.lost(), batch)
        are_alike = len(chunks) == len(self.scheduler.running) and not batch.prompt_tokens
        steps = min(map(_num_left, chunks)) if are_alike and not self.scheduler.waiting else 1
        now = self._timeline.now
        for chunk in chunks:
            if chunk.sequence.started is None:
                chunk.sequence.started = now
                self.queue_waits.append(now - chunk.sequence.arrived)
        self._run = Run(chunks, batch, now, self._steps.timed(batch), steps, Event(self._end_run), extra)
        self._plan_end(self._run)

    def _end_run(self) -> None:
        """postprocess: commit what was computed, and end what is complete."""
        run, now = self._run, self._timeline.now
        assert run is not None
        self._run = None
        self._outcome.num_steps += run.steps
        self._hedges.earn(self._steps.note(run.batch, run.timed, run.steps))
        for chunk in run.chunks:
            sequence = chunk.sequence
            if not sequence.blocks:  # preempted, to make room within the same schedule
                continue
            self._advance(chunk, run, now)
        for _ in range(min(run.steps, MEMORY)):  # more of the same change nothing
            self.scheduler.budget.observe(int(run.batch.tokens), run.step_s)
        self._begin()

    def _advance(self, chunk: Chunk, run: Run, now: float) -> None:
        sequence, (_, request) = chunk.sequence, self.requests[chunk.sequence.request.request_id]
        completes = chunk.completes
        self.scheduler.commit(chunk if run.steps == 1 else Chunk(sequence, run.steps))
        if not completes:
            return
        sequence.token_ids.extend([0] * run.steps)
        self._owed -= run.steps
        if request.first is None:
            request.first = now - (run.steps - 1) * run.step_s
        request.last = now
        if sequence.num_output >= request.output_len:
            self.scheduler.finish(sequence, "length")
            del self.requests[sequence.request.request_id]
            self._outcome.finish(request, now)

    def _meet_all(self, lost: Iterable[Lost], batch: Batch) -> float:
        """Seconds that a step takes longer: of a layer, messages to all groups wait side by side, but the next replica
        of a group is met in a layer behind.
        """
        by_group: defaultdict[int, float] = defaultdict(float)
        for each in lost:
            by_group[each.group] += self._meet(each, batch)
        return max(by_group.values(), default=0.0)

    def _meet(self, lost: Lost, batch: Batch) -> float:
        """Seconds that the first message to a dead replica costs; none where this front knows already."""
        if self.breaker.is_open(lost.replica_id):
            return 0.0
        self.breaker.open(lost.replica_id)
        others, tokens = self._steps.living(lost.group), max(1, int(batch.tokens))
        seconds = answer = self._steps.answer_seconds(tokens)
        if lost.is_silent:
            known = others or [lost.replica_id]
            latency = Latency()
            latency.observe(known[0], tokens, answer)
            may_hedge = bool(self._hedges) and bool(others)
            seconds += latency.patience(known[:1], tokens, may_hedge)
            if may_hedge:
                self._hedges.spend()
        why = f"{lost.replica_id} {'fell silent' if lost.is_silent else 'was killed'}"
        self._outcome.stalls.append(Stall(self._timeline.now, self.name, seconds, why))
        return seconds


def batch_of(chunks: list[Chunk]) -> Batch:
    """A chunk of one token is a continuation, as for the engine; prompts of a step count as one."""
    decodes, context, prompt, prompt_context, prompts = 0, 0, 0, 0, 0
    for chunk in chunks:
        if chunk.length == 1:
            decodes += 1
            context += len(chunk.sequence.token_ids)
        else:
            prompts += 1
            prompt += chunk.length
            prompt_context += chunk.sequence.num_computed + chunk.length
    return Batch(decodes, context / max(1, decodes), prompt, prompt_context / max(1, prompts))


def _num_left(chunk: Chunk) -> int:
    """Tokens until the sequence ends. One that has just been read gets its next token by this step."""
    return max(1, chunk.sequence.request.params.max_tokens - chunk.sequence.num_output)


@lru_cache(4096)
def zeros(length: int) -> tuple[int, ...]:
    """Which tokens they are is nothing to a scheduler without a prefix cache."""
    return (0,) * length


def new_scheduler(num_blocks: int, block_size: int, budget: int | None, max_num_seqs: int, longest: int) -> Scheduler:
    allocator = BlockAllocator(num_blocks, block_size, enable_prefix_caching=False)
    return Scheduler(allocator, max_num_batched_tokens=budget, max_num_seqs=max_num_seqs, max_model_len=longest)
