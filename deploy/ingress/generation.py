"""One generation request: its prompts and choices, handed to fronts, their deltas merged as they come."""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from cluster.messages.requests import PromptEmbeds, RequestOutput, SamplingParams
from cluster.metrics import Metrics
from deploy.ingress.fronts.client import FrontClient
from deploy.ingress.fronts.output_stream import OutputStream
from deploy.ingress.openai.choices import Choice, ChoiceDelta, merge
from deploy.ingress.tracing.request_trace import RequestTrace

logger = logging.getLogger(__name__)


class GenerationFailed(RuntimeError):  # noqa: N818
    """A front could not finish a sequence; the message is the front's."""


# Does work of some size, where it holds up nobody.
Run = Callable[[int, Callable[[], ChoiceDelta]], Awaitable[ChoiceDelta]]


async def run_here(size: int, work: Callable[[], ChoiceDelta]) -> ChoiceDelta:
    return work()


class GenerationGivenUp(GenerationFailed):
    """Its front was lost, and none has come back in time: it may succeed later."""


class GenerationRefused(GenerationFailed):
    """The request itself is why; the message says what it has to change."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One choice to generate."""

    choice: Choice
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    prompt_embeds: PromptEmbeds | None = None


class Generation:
    """Start with submit(); then read deltas(); always close()."""

    def __init__(
        self,
        plans: list[Plan],
        client: FrontClient,
        metrics: Metrics,
        request_id: str,
        trace: RequestTrace | None = None,
        run: Run = run_here,
    ) -> None:
        self.request_id = request_id
        self.choices = [plan.choice for plan in plans]
        self._plans = plans
        self._client = client
        self._metrics = metrics
        self._trace = trace
        self._run = run
        self._started = time.monotonic()
        self._streams: list[OutputStream] = []
        self._pumps: list[asyncio.Task[None]] = []

    async def submit(self) -> None:
        """Hand every choice to a front, or none. Raises Overloaded or Unavailable."""
        offers = [asyncio.create_task(self._offer(index, plan)) for index, plan in enumerate(self._plans)]
        try:
            self._streams = await asyncio.gather(*offers)
        except BaseException:
            for offer in offers:
                offer.cancel()
            placed = await asyncio.gather(*offers, return_exceptions=True)
            self._streams = [stream for stream in placed if isinstance(stream, OutputStream)]
            self.close()
            raise

    async def _offer(self, index: int, plan: Plan) -> OutputStream:
        is_traced = self._trace is not None
        label = f"{self.request_id}-{index}"
        return await self._client.submit(label, plan.prompt_token_ids, plan.params, is_traced, plan.prompt_embeds)

    def close(self) -> None:
        """Abort what has not finished."""
        for pump in self._pumps:
            pump.cancel()
        for stream, choice in zip(self._streams, self.choices, strict=False):
            if not stream.is_finished and not choice.must_abort and stream.on_close:
                self._metrics.inc("request_success_total", finished_reason="abort")
            stream.close()

    async def deltas(self) -> AsyncIterator[ChoiceDelta]:
        """Deltas of all choices in the order in which they arrive. What waits of a choice comes as one: a reader that
        is behind gets larger pieces, not more of them. Raises GenerationFailed.
        """
        arrived: asyncio.Queue[ChoiceDelta | Exception] = asyncio.Queue()
        self._pumps = [
            asyncio.create_task(self._pump(choice, stream, arrived))
            for choice, stream in zip(self.choices, self._streams, strict=True)
        ]
        unfinished = len(self._pumps)
        while unfinished:
            items = [await arrived.get()]
            while not arrived.empty():
                items.append(arrived.get_nowait())
            for delta in _merged(item for item in items if isinstance(item, ChoiceDelta)):
                unfinished -= delta.finish_reason is not None
                yield delta
            for item in items:
                if isinstance(item, Exception):
                    raise item

    async def _pump(
        self, choice: Choice, stream: OutputStream, arrived: "asyncio.Queue[ChoiceDelta | Exception]"
    ) -> None:
        try:
            await self._forward(choice, stream, arrived)
        except Exception as error:  # unseen, it would leave the client waiting for ever
            logger.exception("a choice has failed", extra={"request_id": self.request_id})
            self._metrics.inc("requests_failed_total", reason="internal")
            arrived.put_nowait(GenerationFailed(f"{type(error).__name__}: {error}"))

    async def _forward(
        self, choice: Choice, stream: OutputStream, arrived: "asyncio.Queue[ChoiceDelta | Exception]"
    ) -> None:
        last = None
        async for output in stream:
            if self._trace:
                self._trace.observe(choice.index, stream, output)
            if output.error is not None:
                arrived.put_nowait(self._failure(output, stream.is_given_up))
                return
            last = self._observe(last, bool(output.token_ids))
            delta = await self._run(choice.effort(output), partial(choice.feed, output))
            if not delta.is_empty:
                arrived.put_nowait(delta)
            if choice.finish_reason is not None:
                self._finished(choice, choice.finish_reason, stream.front)
                break
        stream.close()

    def _failure(self, output: RequestOutput, is_given_up: bool) -> GenerationFailed:
        if is_given_up:
            return GenerationGivenUp(output.error)  # counted as any other 503
        if output.is_refusal:
            return GenerationRefused(output.error)  # no fault of ours: not counted, as any other 400
        self._metrics.inc("requests_failed_total", reason="engine")
        return GenerationFailed(output.error)

    def _finished(self, choice: Choice, reason: str, front: str) -> None:
        seconds = time.monotonic() - self._started
        self._metrics.observe("e2e_request_latency_seconds", seconds)
        self._metrics.inc("request_success_total", finished_reason=reason)
        extra = {"request_id": self.request_id, "choice": choice.index, "finish_reason": reason}
        tokens = {"prompt_tokens": len(choice.prompt_token_ids), "completion_tokens": choice.num_tokens}
        if self._trace:
            extra["trace_id"] = self._trace.trace_id
        logger.info("request finished", extra=extra | tokens | {"seconds": round(seconds, 3), "front": front})

    def _observe(self, last: float | None, has_token: bool) -> float | None:
        """Record the time since the last token; returns the time of this one."""
        now = time.monotonic()
        if not has_token:
            return last
        if last is None:
            self._metrics.observe("time_to_first_token_seconds", now - self._started)
        else:
            self._metrics.observe("inter_token_latency_seconds", now - last)
        return now


def _merged(deltas: Iterable[ChoiceDelta]) -> Iterator[ChoiceDelta]:
    """One for each choice, in the order in which the first ones came."""
    by_choice: dict[int, list[ChoiceDelta]] = defaultdict(list)
    for delta in deltas:
        by_choice[delta.index].append(delta)
    return map(merge, by_choice.values())
