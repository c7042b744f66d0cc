"""The ingress's side of the fronts: picks one for each request, brings outputs back to the request that waits.

One long poll per front carries the outputs of all requests, so a step costs one Ray message, not one per token.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from cluster.messages import ClusterState, GenerationRequest, RequestOutput, SamplingParams, Submitted

logger = logging.getLogger(__name__)


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
        self.on_close: Callable[[], None] | None = None
        self._queue: asyncio.Queue[RequestOutput] = asyncio.Queue()

    def put(self, output: RequestOutput) -> None:
        self._queue.put_nowait(output)

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
        on_close, self.on_close = self.on_close, None
        if on_close:
            on_close()


@dataclass(slots=True)
class _Front:
    name: str
    handle: Any
    poll: asyncio.Task[None] | None = None
    streams: dict[str, OutputStream] = field(default_factory=dict)
    outstanding_tokens: int = 0

    def add(self, stream: OutputStream) -> None:
        self.streams[stream.request.request_id] = stream
        self.outstanding_tokens += stream.cost

    def remove(self, stream: OutputStream) -> None:
        if self.streams.pop(stream.request.request_id, None):
            self.outstanding_tokens -= stream.cost


class FrontClient:
    """Belongs to one event loop. `ingress_id` names this ingress to the fronts."""

    def __init__(self, ingress_id: str) -> None:
        self.ingress_id = ingress_id
        self._fronts: dict[str, _Front] = {}
        self._aborts: set[asyncio.Task[None]] = set()

    def update(self, state: ClusterState) -> None:
        """Talk to exactly the fronts that the supervisor says are ready."""
        for name in state.fronts:
            if name not in self._fronts:
                try:
                    front = _Front(name, ray.get_actor(name, state.namespace))
                except ValueError:
                    continue  # gone again; the next state will say so
                front.poll = asyncio.create_task(self._poll(front))
                self._fronts[name] = front
        for name in set(self._fronts) - set(state.fronts):
            self._drop(self._fronts[name], "left the cluster")

    @property
    def is_available(self) -> bool:
        return bool(self._fronts)

    async def submit(
        self, request_id: str, prompt_token_ids: tuple[int, ...], params: SamplingParams
    ) -> "OutputStream":
        """Hand a sequence to the front with the least outstanding tokens. Raises Overloaded or Unavailable."""
        request = GenerationRequest(request_id, self.ingress_id, prompt_token_ids, params)
        stream = OutputStream(request)
        for front in sorted(self._fronts.values(), key=lambda f: f.outstanding_tokens):
            if await self._offer(front, stream):
                return stream
        raise Overloaded if self._fronts else Unavailable

    async def _offer(self, front: _Front, stream: "OutputStream") -> bool:
        front.add(stream)
        is_accepted = False
        try:
            answer: Submitted = await front.handle.submit.remote(stream.request)
            is_accepted = answer.accepted
        except RayError as error:
            logger.warning("front %s did not take a request: %s", front.name, error)
        except asyncio.CancelledError:
            self._abort(front, stream.request.request_id)
            raise
        finally:
            if not is_accepted:
                front.remove(stream)
        stream.on_close = lambda: self._close(front, stream)
        return is_accepted

    def _close(self, front: _Front, stream: "OutputStream") -> None:
        front.remove(stream)
        if not stream.is_finished:
            self._abort(front, stream.request.request_id)

    def _abort(self, front: _Front, request_id: str) -> None:
        # A task of its own: the caller is being cancelled, and the abort must go out all the same.
        task = asyncio.create_task(self._send_abort(front, request_id))
        self._aborts.add(task)
        task.add_done_callback(self._aborts.discard)

    async def _send_abort(self, front: _Front, request_id: str) -> None:
        with contextlib.suppress(RayError):
            await front.handle.abort.remote((request_id,))

    async def _poll(self, front: _Front) -> None:
        while True:
            try:
                outputs: tuple[RequestOutput, ...] = await front.handle.poll.remote(self.ingress_id)
            except RayActorError as error:
                self._drop(front, str(error).splitlines()[0])
                return
            for output in outputs:
                if stream := front.streams.get(output.request_id):
                    stream.put(output)

    def _drop(self, front: _Front, why: str) -> None:
        logger.warning("front %s is gone: %s", front.name, why)
        self._fronts.pop(front.name, None)
        for request_id, stream in front.streams.items():
            stream.put(RequestOutput(request_id, finish_reason="error", error=f"front {front.name} was lost"))
        if front.poll and front.poll is not asyncio.current_task():
            front.poll.cancel()

    async def close(self) -> None:
        for front in tuple(self._fronts.values()):
            if front.poll:
                front.poll.cancel()
