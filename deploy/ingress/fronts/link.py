"""An ingress's link to one front: its lease, the outputs that come back, the aborts that go there.

One long poll carries the outputs of all requests, so a step costs one Ray message, not one per token. Each poll
acknowledges what has arrived, so an answer that is lost comes again. The front forgets an ingress that was silent for
too long; it is told so by its next poll, and its requests are replayed as if the front were lost.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, Literal

from ray.exceptions import ActorDiedError, RayError, TaskCancelledError

from cluster.messages.requests import Delivery, Submitted
from deploy.ingress.fronts.output_stream import OutputStream

logger = logging.getLogger(__name__)

# Why a front has not taken a request.
Refusal = Literal["full", "draining", "lost"]
# How a link ends: the front is gone or can't be reached, has left by plan, or has ended the lease of this ingress.
Ending = Literal["lost", "left", "dropped"]

# Starts a task that belongs to no request.
Spawn = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]

# A poll is answered within 10 s (actors/front/actor.py). This many may fail in a row before the front counts as lost.
POLL_TIMEOUT_S = 20.0
MAX_FAILED_POLLS = 2
CALL_TIMEOUT_S = 10.0
RETRY_S = 0.2
# A front that was full is not asked again for so long.
FULL_S = 0.2
# A front that can't be told of the end of a lease ends it by itself, after LEASE_S (actors/front/mailboxes.py).
END_PAUSES_S = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)


class FrontLink:
    """Belongs to one event loop. `on_end` is called once, when the front is lost or has dropped this ingress. No more
    than `max_unanswered` new requests wait for the front's answer.
    """

    def __init__(
        self,
        name: str,
        handle: Any,
        ingress_id: str,
        on_end: "Callable[[FrontLink, Ending], None]",
        max_unanswered: int,
    ) -> None:
        self.name = name
        self.handle = handle
        self.lease = f"{ingress_id}-{uuid.uuid4().hex}"
        self.streams: dict[str, OutputStream] = {}
        self.outstanding_tokens = 0
        self.is_open = False
        self.is_draining = False
        self.is_doubtful = False  # an offer was not answered in time, nor has been any poll since
        self._on_end = on_end
        self._is_ended = False
        self._num_received = 0
        self._full_until = 0.0
        self._max_unanswered = max_unanswered
        self._num_unanswered = 0
        self._aborts: asyncio.Queue[str] = asyncio.Queue()
        self._tasks: tuple[asyncio.Task[None], ...] = ()

    @property
    def is_full(self) -> bool:
        """True for a moment after the front has said so, and while too many offers wait for its answer."""
        return time.monotonic() < self._full_until or self._num_unanswered >= self._max_unanswered

    def start(self, on_open: Callable[[], None], spawn: Spawn) -> None:
        self._tasks = spawn(self._follow(on_open)), spawn(self._send_aborts())

    def end(self, ending: Ending) -> None:
        """Give the front up, once. Streams that it has are `on_end`'s business."""
        if self._is_ended:
            return
        self._is_ended, self.is_open = True, False
        self.stop()
        self._on_end(self, ending)

    def stop(self) -> None:
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()

    async def close_lease(self) -> None:
        """Have the front abort what it still runs for this link: a front that counts as lost may live."""
        for pause in END_PAUSES_S:
            await asyncio.sleep(pause)
            if await self._is_told(lambda: self.handle.close.remote(self.lease)):
                return

    # -- requests ------------------------------------------------------------------------------------------------

    async def offer(self, stream: OutputStream, request_id: str) -> Refusal | None:
        """Hand a sequence to the front; None: it has taken it."""
        request = stream.next_offer(request_id, self.lease)
        self._add(stream)
        stream.front, stream.offered = self.name, time.monotonic()
        self._num_unanswered += 1
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                answer: Submitted = await self.handle.submit.remote(request)
        except (asyncio.CancelledError, TaskCancelledError):  # with a request, Ray cancels the calls made for it
            self._take_back(stream)
            raise
        except (RayError, TimeoutError) as error:
            logger.warning("front %s did not take a request: %s", self.name, _first_line(error))
            self.is_doubtful = isinstance(error, TimeoutError)
            self._take_back(stream)  # it may have taken it, and only the answer was lost
            return "lost"
        finally:
            self._num_unanswered -= 1
        if not answer.accepted:
            return self._refused(stream, answer)
        if not self.is_open:  # it was lost since it has answered; with the lease, it ends what it took
            self._remove(stream)
            return "lost"
        stream.on_close = lambda: self._take_back(stream)
        if stream.is_closed:  # by its client, while a replay was being handed over
            stream.close()
        return None

    def _refused(self, stream: OutputStream, answer: Submitted) -> Refusal:
        self._remove(stream)
        if answer.reason == "full":
            self._full_until = time.monotonic() + FULL_S
            return "full"
        if answer.reason == "draining":
            self.is_draining = True
            return "draining"
        return "lost"  # its lease has ended: the next poll says so, too

    def _add(self, stream: OutputStream) -> None:
        self.streams[stream.request.request_id] = stream
        self.outstanding_tokens += stream.cost

    def _remove(self, stream: OutputStream) -> None:
        if self.streams.pop(stream.request.request_id, None):
            self.outstanding_tokens -= stream.cost

    def _take_back(self, stream: OutputStream) -> None:
        self._remove(stream)
        if not stream.is_complete:
            self._aborts.put_nowait(stream.request.request_id)

    # -- tasks ---------------------------------------------------------------------------------------------------

    async def _follow(self, on_open: Callable[[], None]) -> None:
        """Open the lease and take in outputs until the front is lost, or has ended the lease."""
        ending: Ending = "lost"
        try:
            await self._ask(lambda: self.handle.open.remote(self.lease))
            self.is_open = True
            on_open()
            while delivery := await self._ask(lambda: self.handle.poll.remote(self.lease, self._num_received)):
                self._take_in(delivery)
            ending = "dropped"
        except (RayError, TimeoutError) as error:
            logger.warning("front %s is lost: %s", self.name, _first_line(error))
        except Exception:  # whatever it is, nobody may wait for a link that nobody follows
            logger.exception("front %s is given up after an unexpected error", self.name)
        self.end(ending)

    async def _ask(self, call: Callable[[], Awaitable[Any]]) -> Any:
        """Ask again if it fails: connections may break while both ends live. Raises RayError or TimeoutError."""
        num_failed = 0
        while True:
            try:
                async with asyncio.timeout(POLL_TIMEOUT_S):
                    return await call()
            except ActorDiedError:
                raise
            except (RayError, TimeoutError):
                num_failed += 1
                if num_failed > MAX_FAILED_POLLS:
                    raise
            await asyncio.sleep(RETRY_S)

    def _take_in(self, delivery: Delivery) -> None:
        self.is_doubtful = False
        for output in delivery.outputs[max(0, self._num_received + 1 - delivery.first) :]:
            self._num_received += 1
            if stream := self.streams.get(output.request_id):
                stream.put(output)
                if stream.is_complete:
                    self._remove(stream)

    async def _send_aborts(self) -> None:
        """In a task that belongs to no request: when Serve cancels a request, Ray cancels every call that was made on
        its behalf, so an abort sent by the request itself could be cancelled on its way. Goes on until the front has
        heard it; if the link ends before, the end of the lease aborts everything.
        """
        while True:
            request_ids = [await self._aborts.get()]
            while not self._aborts.empty():
                request_ids.append(self._aborts.get_nowait())
            abort = partial(self.handle.abort.remote, tuple(request_ids))
            while not await self._is_told(abort):
                await asyncio.sleep(RETRY_S)

    async def _is_told(self, call: Callable[[], Awaitable[None]]) -> bool:
        """True if the front has heard it, or is dead."""
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                await call()
        except ActorDiedError:
            return True
        except (RayError, TimeoutError):
            return False
        except Exception:  # whatever it is, aborts must go on
            logger.exception("front %s could not be told", self.name)
            return False
        return True


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
