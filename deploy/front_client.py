"""The ingress's side of the fronts: picks one for each request, brings outputs back to the request that waits.

One long poll per front carries the outputs of all requests, so a step costs one Ray message, not one per token.
A request whose front dies is replayed from its prompt and the tokens emitted so far, on another front or on the one
that takes its place: sampling depends on seed and position only, so it continues with the same tokens.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import ray
from ray.exceptions import RayError, TaskCancelledError

from cluster.messages import ClusterState, GenerationRequest, RequestOutput, SamplingParams, Submitted
from cluster.metrics import Metrics

logger = logging.getLogger(__name__)

# How long requests wait for a front while none is there, how long until they ask again, and how often one is replayed.
FRONT_WAIT_S = 60.0
PAUSE_S = 0.2
MAX_REPLAYS = 3

# Why a front has not taken a request.
Refusal = Literal["full", "draining", "lost"]


class Overloaded(Exception):  # noqa: N818 - an answer, not a failure
    """Every front's waiting queue is full."""


class Unavailable(Exception):  # noqa: N818
    """No front serves now."""


class OutputStream:
    """Outputs of one sequence until it finishes. close() early, and the sequence is aborted."""

    def __init__(self, request: GenerationRequest) -> None:
        self.request = request
        self.cost = len(request.prompt_token_ids) + request.params.max_tokens
        self.is_finished = False
        self.is_closed = False
        self.num_replays = 0
        self.on_close: Callable[[], None] | None = None
        self.front, self.offered = "", 0.0  # which it was last offered to, and when
        self._emitted = request.output_token_ids
        self._queue: asyncio.Queue[RequestOutput] = asyncio.Queue()

    def put(self, output: RequestOutput) -> None:
        self._emitted += output.token_ids
        self._queue.put_nowait(output)

    def fail(self, error: str) -> None:
        self.put(RequestOutput(self.request.request_id, finish_reason="error", error=error))

    def renew(self) -> None:
        """From now on the request is one that continues what was emitted; late outputs of the old one don't fit it."""
        self.num_replays += 1
        name = f"{self.request.request_id.partition('/')[0]}/{self.num_replays}"
        self.request = replace(self.request, request_id=name, output_token_ids=self._emitted)

    def __aiter__(self) -> "OutputStream":
        return self

    async def __anext__(self) -> RequestOutput:
        if self.is_finished:
            raise StopAsyncIteration
        output = await self._queue.get()
        self.is_finished = output.finish_reason is not None
        return output

    def close(self) -> None:
        """Safe to call at any time, any number of times."""
        self.is_closed = True
        on_close, self.on_close = self.on_close, None
        if on_close:
            on_close()


@dataclass(slots=True)
class _Front:
    name: str
    handle: Any
    tasks: tuple[asyncio.Task[None], ...] = ()
    aborts: asyncio.Queue[str] = field(default_factory=asyncio.Queue)
    streams: dict[str, OutputStream] = field(default_factory=dict)
    outstanding_tokens: int = 0
    is_draining: bool = False

    def add(self, stream: OutputStream) -> None:
        self.streams[stream.request.request_id] = stream
        self.outstanding_tokens += stream.cost

    def remove(self, stream: OutputStream) -> None:
        if self.streams.pop(stream.request.request_id, None):
            self.outstanding_tokens -= stream.cost


class FrontClient:
    """Belongs to one event loop. `ingress_id` names this ingress to the fronts."""

    def __init__(self, ingress_id: str, metrics: Metrics) -> None:
        self.ingress_id = ingress_id
        self.metrics = metrics
        self._fronts: dict[str, _Front] = {}
        self._fronts_changed = asyncio.Event()
        self._replays: set[asyncio.Task[None]] = set()

    def update(self, state: ClusterState) -> None:
        """Talk to exactly the fronts that the supervisor says serve; those that drain get no new requests."""
        serving = {*state.fronts, *state.draining}
        for name in serving:
            if name not in self._fronts:
                try:
                    front = _Front(name, ray.get_actor(name, state.namespace))
                except ValueError:
                    continue  # gone again; the next state will say so
                front.tasks = asyncio.create_task(self._poll(front)), asyncio.create_task(self._send_aborts(front))
                self._fronts[name] = front
                self._fronts_changed.set()
            self._fronts[name].is_draining = name in state.draining
        for name in set(self._fronts) - serving:
            self._drop(self._fronts[name], "left the cluster")

    @property
    def is_available(self) -> bool:
        return bool(self._open_fronts())

    def _open_fronts(self) -> list[_Front]:
        """Those that take requests, the least loaded first."""
        fronts = (front for front in self._fronts.values() if not front.is_draining)
        return sorted(fronts, key=lambda front: front.outstanding_tokens)

    async def submit(
        self, request_id: str, prompt_token_ids: tuple[int, ...], params: SamplingParams, is_traced: bool = False
    ) -> "OutputStream":
        """Hand a sequence to the front with the least outstanding tokens; wait for one if none is there.

        Raises Overloaded or Unavailable.
        """
        request = GenerationRequest(request_id, self.ingress_id, prompt_token_ids, params, is_traced=is_traced)
        stream = OutputStream(request)
        deadline = time.monotonic() + FRONT_WAIT_S
        while not await self._place(stream):
            await self._wait_for_front(deadline)
        return stream

    async def _place(self, stream: "OutputStream") -> bool:
        """Whether a front has taken it. Raises Overloaded where all fronts are full: one that is lost or drains only
        now isn't, another one may take its place.
        """
        refusals: set[Refusal] = set()
        for front in self._open_fronts():
            refusal = await self._offer(front, stream)
            if refusal is None:
                return True
            refusals.add(refusal)
        if refusals == {"full"}:
            raise Overloaded
        return False

    async def _wait_for_front(self, deadline: float) -> None:
        """Until a front joins, or, where some are there that have not taken the request, for a moment."""
        self._fronts_changed.clear()
        left = deadline - time.monotonic()
        if left <= 0:
            raise Unavailable
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._fronts_changed.wait(), min(left, PAUSE_S) if self.is_available else left)

    async def _offer(self, front: _Front, stream: "OutputStream") -> Refusal | None:
        front.add(stream)
        stream.front, stream.offered = front.name, time.monotonic()
        try:
            answer: Submitted = await front.handle.submit.remote(stream.request)
        except (asyncio.CancelledError, TaskCancelledError):  # with a request, Ray cancels the calls made for it
            self._close(front, stream)
            raise
        except RayError as error:
            logger.warning("front %s did not take a request: %s", front.name, str(error).partition("\n")[0])
            self._close(front, stream)  # it may have taken it, and only the answer was lost
            return "lost"
        if not answer.accepted or self._fronts.get(front.name) is not front:
            front.remove(stream)
            front.is_draining |= answer.reason == "draining"
            return answer.reason or "lost"  # since it has answered
        stream.on_close = lambda: self._close(front, stream)
        if stream.is_closed:  # by its client, while a replay was being handed over
            stream.close()
        return None

    def _close(self, front: _Front, stream: "OutputStream") -> None:
        front.remove(stream)
        if not stream.is_finished:
            front.aborts.put_nowait(stream.request.request_id)

    async def _send_aborts(self, front: _Front) -> None:
        """In a task that belongs to no request: when Serve cancels a request, Ray cancels every call that was made on
        its behalf, so an abort sent by the request itself could be cancelled on its way.
        """
        while True:
            request_ids = [await front.aborts.get()]
            while not front.aborts.empty():
                request_ids.append(front.aborts.get_nowait())
            with contextlib.suppress(RayError):
                await front.handle.abort.remote(tuple(request_ids))

    async def _poll(self, front: _Front) -> None:
        while True:
            try:
                outputs: tuple[RequestOutput, ...] = await front.handle.poll.remote(self.ingress_id)
            except RayError as error:
                self._drop(front, str(error).partition("\n")[0])
                return
            for output in outputs:
                if stream := front.streams.get(output.request_id):
                    stream.put(output)

    def _drop(self, front: _Front, why: str) -> None:
        logger.warning("front %s is gone: %s", front.name, why)
        self._fronts.pop(front.name, None)
        for stream in tuple(front.streams.values()):
            if stream.on_close is None:
                continue  # still being offered: whoever offers it goes on to the next front
            stream.on_close = None
            task = asyncio.create_task(self._replay(stream))
            self._replays.add(task)
            task.add_done_callback(self._replays.discard)
        for task in front.tasks:
            if task is not asyncio.current_task():
                task.cancel()

    async def _replay(self, stream: "OutputStream") -> None:
        """Continue a stream elsewhere. A request that keeps killing fronts is given up after a few."""
        if stream.num_replays >= MAX_REPLAYS:
            stream.fail(f"its front was lost {MAX_REPLAYS + 1} times")
            return
        stream.renew()
        self.metrics.inc("front_replays_total")
        deadline = time.monotonic() + FRONT_WAIT_S
        while not stream.is_closed:
            try:
                if await self._place(stream):
                    return
                await self._wait_for_front(deadline)
            except Overloaded:  # it was admitted once: now it waits for its turn
                await asyncio.sleep(PAUSE_S)
            except Unavailable:
                stream.fail(f"no front has come back within {FRONT_WAIT_S:g} s")
                return

    async def close(self) -> None:
        for front in tuple(self._fronts.values()):
            for task in front.tasks:
                task.cancel()
