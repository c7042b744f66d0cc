"""The engine of a front: schedule -> step -> postprocess, over and over.

Single-threaded: whoever owns an Engine calls it from one thread. It knows no Ray; the dispatcher reaches the experts.
The file is long because a step and all that can end a sequence in it are one story.
"""

import logging
import time
from collections.abc import Iterable

import torch
from torch import Tensor

from actors.dispatch.dispatcher import Dispatcher
from actors.dispatch.step import Step
from actors.engine.batch_builder import build_batch
from actors.engine.constraint import Constraint, Masks
from actors.engine.pooling import Pooled
from actors.engine.readout import Sampled, sample_next, score_prompt
from actors.engine.scheduler import Chunk, Scheduler
from actors.engine.self_test import BrokenEngineError, SelfTest
from actors.engine.sequence import Sequence
from actors.lanes.step_id import StepId
from actors.model.batch import Span
from actors.model.front_half import FrontHalf
from actors.model.paged_kv import PagedKV
from cluster.messages.requests import FinishReason, GenerationRequest, RequestOutput, RoutedExperts, TokenLogprob
from cluster.metrics import Metrics
from cluster.models.grammars import GrammarError

logger = logging.getLogger(__name__)


class Engine:
    def __init__(
        self,
        model: FrontHalf,
        kv: PagedKV,
        dispatcher: Dispatcher,
        scheduler: Scheduler,
        metrics: Metrics,
        actor_id: str = "front-0",
    ) -> None:
        self.model = model
        self.kv = kv
        self.dispatcher = dispatcher
        self.scheduler = scheduler
        self.metrics = metrics
        self.sequences: dict[str, Sequence] = {}
        self._masks = Masks()
        self.is_broken = False
        self._self_test = SelfTest(model, kv, scheduler)
        self._step_id = StepId.first_of(actor_id)
        spec = model.spec
        self.expert_counts = torch.zeros(spec.num_expert_layers, spec.num_experts, dtype=torch.int64)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add(self, request: GenerationRequest, constraint: Constraint | None = None) -> None:
        """`constraint` is that of the request's grammar. Raises ValueError for a sequence that could never run: it
        would hold up all that wait behind it.
        """
        sequence = Sequence.of(request, constraint)
        if not 0 < len(sequence.token_ids) <= self.scheduler.max_model_len:
            raise ValueError(f"{len(sequence.token_ids)} tokens: 1 to {self.scheduler.max_model_len} can be computed")
        self.sequences[request.request_id] = sequence
        self.scheduler.add(sequence)
        if not request.is_replay:
            self.metrics.inc("prompt_tokens_total", len(request.prompt_token_ids))

    def warm_up(self) -> None:
        """See SelfTest.warm_up."""
        self._self_test.warm_up(self.dispatcher)
        if self.model.graphs:
            # Each sequence of a step has a block of its own.
            self.model.graphs.capture(min(self.scheduler.max_num_seqs, self.scheduler.allocator.num_blocks))

    def abort(self, request_id: str) -> None:
        """Take a request out between steps; unknown and finished ones are none of our business."""
        if sequence := self.sequences.get(request_id):
            self._finish(sequence, "abort")

    def step(self) -> list[RequestOutput]:
        """Compute one step. If it fails, its sequences end with an error and the engine goes on.

        What can't be laid at the door of some sequences, such as a scheduler that fails, would fail again in every
        step: then all sequences end, and the engine goes on with empty books.

        Raises BrokenEngineError if it is the engine that fails, whatever the sequences; it is_broken from then on.
        """
        everyone = tuple(self.sequences.values())
        try:
            return self._step()
        except BrokenEngineError:
            raise
        except Exception as error:
            logger.exception("no step is possible: %d sequences end", len(everyone))
            self.sequences.clear()
            self.scheduler.clear()
            self._look_at_itself(error)
            return [failure(sequence.request.request_id, error) for sequence in everyone]

    def _step(self) -> list[RequestOutput]:
        started = time.monotonic()
        chunks = self.scheduler.schedule()
        if not chunks:
            return []
        step = self._begin(chunks)
        try:
            outputs = self._compute(chunks, step)
            self._self_test.is_well()
        except Exception as error:
            logger.exception("step of %d sequences failed", len(chunks), extra=step.extra)
            self._look_at_itself(error)
            outputs = [self._fail(chunk.sequence, error) for chunk in chunks]
        num_tokens, seconds = sum(chunk.length for chunk in chunks), time.monotonic() - started
        self.scheduler.budget.observe(num_tokens, seconds)
        self.metrics.observe("step_tokens", num_tokens)
        self.metrics.observe("step_seconds", seconds)
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("step of %d tokens took %.1f ms", num_tokens, 1e3 * seconds, extra=step.extra)
        return outputs

    def _look_at_itself(self, error: Exception) -> None:
        """After a failed step. Raises BrokenEngineError if no other will succeed; is_broken from then on."""
        try:
            self._self_test.look(error)
        except BrokenEngineError:
            self.is_broken = True
            raise

    def _begin(self, chunks: list[Chunk]) -> Step:
        """Name the step, and note it where a trace will ask for it."""
        self._step_id = self._step_id.next()
        step = Step(self._step_id, tuple(chunk.sequence.request.label for chunk in chunks))
        for chunk in chunks:
            if chunk.sequence.started is None:
                self._start(chunk.sequence)
            if chunk.sequence.request.is_traced:
                chunk.sequence.steps.append(step)
        return step

    def _start(self, sequence: Sequence) -> None:
        sequence.started = time.monotonic()
        self.metrics.observe("request_queue_time_seconds", sequence.started - sequence.arrived)

    @torch.inference_mode()
    def _compute(self, chunks: list[Chunk], step: Step) -> list[RequestOutput]:
        self.dispatcher.step = step
        batch = build_batch(chunks, self.scheduler.allocator.block_size, self.model.staging)
        failures = self._masks.begin([c.sequence for c in chunks if c.completes and c.sequence.constraint])
        hidden_RD, ids_TLK = self.model.forward(batch, self.kv, self.dispatcher)
        self._count_experts(ids_TLK)
        return self._postprocess(chunks, batch.spans, hidden_RD, failures())

    def _postprocess(
        self, chunks: list[Chunk], spans: tuple[Span, ...], hidden_RD: Tensor, failed: dict[Sequence, GrammarError]
    ) -> list[RequestOutput]:
        """Sequences in `failed` get no token: no other one suffers from that."""
        sampling, last_rows = [], []
        for chunk, span in zip(chunks, spans, strict=True):
            if chunk.sequence.wants_prompt_logprobs:
                score_prompt(self.model, chunk.sequence, hidden_RD[span.logits], span.context - span.num_logits)
            if kind := chunk.sequence.request.params.pooling:
                chunk.sequence.pooled = chunk.sequence.pooled or Pooled(kind)
                if span.num_logits:
                    chunk.sequence.pooled.add(hidden_RD[span.logits])
            if chunk.completes and chunk.sequence.request.params.max_tokens:
                if chunk.sequence in failed:
                    continue
                sampling.append(chunk.sequence)
                last_rows.append(span.logits.stop - 1)
        sampled: dict[str, Sampled] = {}
        if sampling:
            (last_rows_R,) = self.model.staging.upload(torch.tensor(last_rows))
            sampled = sample_next(self.model, sampling, hidden_RD[last_rows_R])
        outputs = []
        for chunk in chunks:
            completes = chunk.completes
            self.scheduler.commit(chunk)
            if failure := failed.get(chunk.sequence):
                outputs.append(self._fail(chunk.sequence, failure))
            elif completes:
                outputs.append(self._output(chunk.sequence, sampled.get(chunk.sequence.request.request_id)))
        return outputs

    def _output(self, sequence: Sequence, sampled: Sampled | None) -> RequestOutput:
        """Add the sampled token to the sequence, and say what is new."""
        is_first = sequence.num_output == len(sequence.request.output_token_ids)
        token_ids: tuple[int, ...] = ()
        logprobs: tuple[TokenLogprob, ...] = ()
        if sampled is not None:
            token, scored = sampled
            token_ids, logprobs = (token,), () if scored is None else (scored,)
            self.metrics.inc("generation_tokens_total")
        # Before finishing, which gives the blocks back.
        routed = self._routed(sequence) if sequence.request.params.return_routed_experts else None
        sequence.token_ids.extend(token_ids)
        reason = self._finish_reason(sequence)
        if reason:
            self._finish(sequence, reason)
        scores = sequence.prompt_logprobs if is_first else None
        return RequestOutput(
            sequence.request.request_id,
            token_ids,
            logprobs,
            None if scores is None else tuple(scores),
            reason,
            sequence.num_cached or 0,
            routed,
            timing=sequence.take_timing() if sequence.request.is_traced else None,
            embedding=sequence.pooled.as_bytes() if sequence.pooled else None,
        )

    def _finish_reason(self, sequence: Sequence) -> FinishReason | None:
        params = sequence.request.params
        if sequence.num_output and sequence.token_ids[-1] in params.stop_token_ids:
            return "stop"
        if sequence.num_output >= params.max_tokens or len(sequence.token_ids) >= self.scheduler.max_model_len:
            return "length"
        return None

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        del self.sequences[sequence.request.request_id]
        self.scheduler.finish(sequence, reason)

    def _fail(self, sequence: Sequence, error: Exception) -> RequestOutput:
        if sequence.finish_reason is None:
            self._finish(sequence, "error")
        return failure(sequence.request.request_id, error)

    def _routed(self, sequence: Sequence) -> RoutedExperts:
        """The experts of the tokens computed since the last report. A sequence's last token is never computed."""
        size, first = self.scheduler.allocator.block_size, sequence.num_routed
        positions = torch.arange(first, sequence.num_computed)
        slots = torch.tensor(sequence.blocks, dtype=torch.int64)[positions // size] * size + positions % size
        ids_TLK = self.kv.read_routed(slots.to(self.model.compute.device)).cpu().contiguous()
        sequence.num_routed = sequence.num_computed
        shape = (ids_TLK.shape[0], ids_TLK.shape[1], ids_TLK.shape[2])
        return RoutedExperts(shape, str(ids_TLK.dtype).removeprefix("torch."), ids_TLK.numpy().tobytes(), first)

    def _count_experts(self, ids_TLK: Tensor) -> None:
        num_layers, num_experts = self.expert_counts.shape
        (ids_TLK,) = self.model.staging.download(ids_TLK)
        flat = ids_TLK.long() + torch.arange(num_layers)[:, None] * num_experts
        self.expert_counts += flat.flatten().bincount(minlength=num_layers * num_experts).view(num_layers, -1)

    def publish_gauges(self) -> None:
        """Bring gauges and counters of the scheduler up to date; called when metrics are read."""
        scheduler = self.scheduler
        self.metrics.set("num_requests_running", len(scheduler.running))
        self.metrics.set("num_requests_waiting", len(scheduler.waiting))
        self.metrics.set("kv_cache_usage_ratio", scheduler.allocator.num_used / scheduler.allocator.num_blocks)
        self.metrics.raise_to("prefix_cache_queries_total", scheduler.num_prefix_queries)
        self.metrics.raise_to("prefix_cache_hits_total", scheduler.num_prefix_hits)
        self.metrics.raise_to("num_preemptions_total", scheduler.num_preemptions)

    def check_integrity(self) -> None:
        """Raise AssertionError unless engine, scheduler and allocator agree."""
        scheduled: Iterable[Sequence] = (*self.scheduler.running, *self.scheduler.waiting)
        assert {id(s) for s in scheduled} == {id(s) for s in self.sequences.values()}, "a sequence leaked"
        self.scheduler.check_integrity()


def failure(request_id: str, error: Exception) -> RequestOutput:
    """What a sequence ends with that can't be finished, or not be begun."""
    if isinstance(error, GrammarError):
        return RequestOutput(request_id, finish_reason="error", error=str(error), is_refusal=True)
    return RequestOutput(request_id, finish_reason="error", error=f"{type(error).__name__}: {error}")
