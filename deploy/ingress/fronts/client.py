"""The ingress's side of the fronts: picks one for each request, and another one when a front is lost.

A request whose front dies is replayed from its prompt and the tokens emitted so far, on another front or on the one
that takes its place: sampling depends on seed and position only, so it continues with the same tokens.
"""

import asyncio
import contextlib
import contextvars
import itertools
import logging
import random
import time
from collections.abc import Coroutine, Iterator
from typing import Any

import ray

from cluster.messages.requests import GenerationRequest, PromptEmbeds, SamplingParams
from cluster.messages.state import ClusterState
from cluster.metrics import Metrics
from deploy.ingress.fronts.link import Ending, FrontLink, Refusal
from deploy.ingress.fronts.output_stream import OutputStream

logger = logging.getLogger(__name__)

# How long requests wait for a front while none is there, how long until they ask again, and how many fronts may be lost
# with one: then it is the request that kills them.
FRONT_WAIT_S = 60.0
PAUSE_S = (0.1, 2.0)  # first and longest
MAX_LOSSES = 3


class Overloaded(Exception):  # noqa: N818 - an answer, not a failure
    """Every front's waiting queue is full, or too many requests wait for a front."""


class Unavailable(Exception):  # noqa: N818
    """No front serves now."""


class FrontClient:
    """Belongs to one event loop. `ingress_id` names this ingress to the fronts. While no front takes requests, no more
    than `max_held` wait for one, and as many for the answer of each.
    """

    def __init__(self, ingress_id: str, metrics: Metrics, max_held: int) -> None:
        self.ingress_id = ingress_id
        self.metrics = metrics
        self._max_held = max_held
        self._num_held = 0
        self._offers = itertools.count()
        self._links: dict[str, FrontLink] = {}
        self._links_changed = asyncio.Event()
        self._known = ClusterState("starting", "starting", "")
        self._sought: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._context = contextvars.copy_context()

    def update(self, state: ClusterState) -> None:
        """Talk to exactly the fronts that the supervisor says serve; those that drain get no new requests."""
        self._known = state
        serving = {*state.fronts, *state.draining}
        for name in serving:
            if link := self._links.get(name):
                self._set_draining(link, name in state.draining)
            elif name not in self._sought:
                self._sought.add(name)
                self._spawn(self._seek(name, state.namespace))
        for name in set(self._links) - serving:
            logger.warning("front %s has left the cluster", name)
            self._links[name].end("left")

    async def _seek(self, name: str, namespace: str) -> None:
        """Connect with a front, if it still serves when it is found. Ray looks it up in a call that blocks."""
        try:
            handle = await asyncio.to_thread(ray.get_actor, name, namespace)
        except ValueError:
            return  # gone again; the next state will say so
        except Exception as error:  # the next state lets us try again
            logger.warning("front %s could not be looked up: %s", name, error)
            return
        finally:
            self._sought.discard(name)
        if name in (*self._known.fronts, *self._known.draining):
            self._connect(name, handle)
            self._set_draining(self._links[name], name in self._known.draining)

    def _set_draining(self, link: FrontLink, is_draining: bool) -> None:
        if link.is_draining and not is_draining:  # a new supervisor did not know it at first
            self._links_changed.set()
        link.is_draining = is_draining

    def _connect(self, name: str, handle: Any) -> None:
        link = self._links[name] = FrontLink(name, handle, self.ingress_id, self._on_end, self._max_held)
        link.start(self._links_changed.set, self._spawn)

    @property
    def is_available(self) -> bool:
        return bool(self._open_links())

    def _open_links(self) -> list[FrontLink]:
        """Fronts that take requests, the least loaded first; those that may hang come last."""
        links = (link for link in self._links.values() if link.is_open and not link.is_draining)
        return sorted(links, key=lambda link: (link.is_doubtful, link.outstanding_tokens))

    async def submit(
        self,
        label: str,
        prompt_token_ids: tuple[int, ...],
        params: SamplingParams,
        is_traced: bool = False,
        prompt_embeds: PromptEmbeds | None = None,
    ) -> OutputStream:
        """Hand a sequence to the front with the least outstanding tokens; wait for one if none is there. `label` names
        it in log lines.

        Raises Overloaded or Unavailable.
        """
        asked = {"is_traced": is_traced, "label": label, "prompt_embeds": prompt_embeds}
        stream = OutputStream(GenerationRequest("", "", prompt_token_ids, params, **asked))  # type: ignore[arg-type]
        deadline = time.monotonic() + FRONT_WAIT_S
        for pause in pauses():
            if await self._place(stream):
                break
            with self._held():
                await self._wait_for_front(deadline, pause)
        return stream

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        if self._num_held >= self._max_held:
            raise Overloaded
        self._num_held += 1
        try:
            yield
        finally:
            self._num_held -= 1

    async def _place(self, stream: OutputStream) -> bool:
        """Whether a front has taken it. Raises Overloaded where all fronts are full: one that is lost or drains only
        now isn't, another one may take its place. Fronts take what was admitted before even if they are full.
        """
        is_new = not stream.request.attempt
        refusals: set[Refusal] = set()
        for link in self._open_links():
            refusal = "full" if is_new and link.is_full else await link.offer(stream, self._new_id())
            if refusal is None:
                return True
            refusals.add(refusal)
        if refusals == {"full"}:
            raise Overloaded
        return False

    def _new_id(self) -> str:
        return f"{self.ingress_id}-{next(self._offers)}"

    async def _wait_for_front(self, deadline: float, pause: float) -> None:
        """Until a front joins, or, where some are there that have not taken the request, for a moment."""
        self._links_changed.clear()
        left = deadline - time.monotonic()
        if left <= 0:
            raise Unavailable
        # Not wait_for(), which begins to wait in a later turn: the next one to wait may have cleared the event by then.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(left, pause) if self.is_available else left):
                await self._links_changed.wait()

    def _on_end(self, link: FrontLink, ending: Ending) -> None:
        """Replay elsewhere what a link has lost, but for streams that are being offered: whoever does that goes on."""
        self._links.pop(link.name, None)
        if ending == "dropped":
            logger.warning("front %s had given this ingress up; requests begin there anew", link.name)
            self._connect(link.name, link.handle)
        else:
            self._spawn(link.close_lease())
        for stream in tuple(link.streams.values()):
            if stream.on_close is not None:
                stream.on_close = None
                stream.num_losses += ending == "lost"
                self._spawn(self._replay(stream))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """In a context of the client's own: with a request, Ray cancels the calls that were made on its behalf."""
        task = asyncio.get_running_loop().create_task(work, context=self._context.copy())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _replay(self, stream: OutputStream) -> None:
        """Continue a stream elsewhere, or end it with an error: nobody waits for a stream without a front."""
        if stream.num_losses > MAX_LOSSES:
            stream.fail(f"its front was lost {stream.num_losses} times")
            return
        stream.renew()
        self.metrics.inc("front_replays_total")
        deadline = time.monotonic() + FRONT_WAIT_S
        try:
            for pause in pauses():
                if stream.is_closed or await self._place(stream):
                    return
                await self._wait_for_front(deadline, pause)
        except Unavailable:
            stream.is_given_up = True
            stream.fail(f"no front has come back within {FRONT_WAIT_S:g} s")
        except Exception as error:
            logger.exception("a request could not be replayed")
            stream.fail(f"{type(error).__name__}: {error}")

    async def close(self) -> None:
        for link in self._links.values():
            link.stop()


def pauses() -> Iterator[float]:
    """Seconds: growing, and random, so that those who wait together don't come back together."""
    pause, longest = PAUSE_S
    while True:
        yield pause * random.uniform(0.5, 1.0)
        pause = min(2 * pause, longest)
