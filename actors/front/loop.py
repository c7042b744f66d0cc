"""The thread that owns a front's engine: takes requests in, steps, hands outputs to the mailboxes. Knows no Ray.

The file is long because all that other threads may ask of the engine stands in it.
"""

import asyncio
import logging
import os
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

from actors.front.mailboxes import Mailboxes
from actors.process.limits import release_free_memory
from cluster.expert_map import ExpertMap
from cluster.messages.actors import ActorReport, FrontSpec, LoadProgress
from cluster.messages.requests import GenerationRequest, RequestOutput, Submitted
from cluster.metrics import Metrics

if TYPE_CHECKING:
    from actors.dispatch.remote import RemoteDispatcher
    from actors.engine.constraint import Constraint
    from actors.engine.engine import Engine
    from cluster.models.grammars import Grammars

logger = logging.getLogger(__name__)

IDLE_WAIT_S = 1.0
SETTLE_S = 30.0
EXPIRE_PERIOD_S = 1.0
# A request may be so late behind its abort: an ingress waits for 10 s for the answer to one.
ABORTED_S = 30.0
# Of prompts that come as embeddings and wait: a token of such a prompt takes a thousand times the memory of an id.
MAX_WAITING_EMBEDS_BYTES = 256 * 2**20
# An engine that fails this often in a row will not recover.
MAX_FAILED_TURNS = 20
FAILED_TURN_PAUSE_S = 0.1


def _end_process() -> None:
    """The quickest way for everyone to notice: requests are replayed elsewhere, the supervisor starts a successor."""
    os._exit(1)


class FrontLoop:
    def __init__(self, spec: FrontSpec, namespace: str, give_up: Callable[[], None] = _end_process) -> None:
        self.spec = spec
        self.namespace = namespace
        self.metrics = Metrics()
        self.engine: Engine | None = None
        self.remote: RemoteDispatcher | None = None
        self.progress = LoadProgress()
        # Filled by the event loop, emptied by the engine's thread: requests first, so that an abort finds its request.
        self._incoming: deque[tuple[GenerationRequest, Constraint | Exception | None]] = deque()
        self._inbox: deque[Callable[[Engine], None]] = deque()
        self._wake = threading.Event()
        self._lease_of: dict[str, str] = {}
        self._aborted: dict[str, float] = {}  # requests that are not known, and since when
        self._grammars: Grammars | None = None
        self.mailboxes = Mailboxes()
        self.is_draining = False
        self._last_turn: float | None = None
        self._give_up = give_up

    def load(self) -> int:
        """Returns bytes of weights."""
        from actors.front.builder import load_parts

        self._parts = load_parts(self.spec, self.namespace, self.metrics, self._advance)
        self.remote = self._parts.remote
        release_free_memory()
        return self._parts.weight_bytes

    def _advance(self, progress: LoadProgress) -> None:
        self.progress = progress

    def set_expert_map(self, expert_map: ExpertMap) -> None:
        if self.remote:
            self.remote.set_map(expert_map)

    def warm_up(self, others: Sequence[int]) -> tuple[int, int]:
        """Make the engine and see that it works (Engine.warm_up). Called before the thread starts.

        `others`: see cpu_budget in actors/engine/memory.py. Returns tokens and bytes of the KV cache.
        """
        from actors.front.builder import build_engine

        self.engine = build_engine(self.spec, self._parts, self.metrics, others)
        self.engine.warm_up()
        allocator = self.engine.scheduler.allocator
        return allocator.num_blocks * allocator.block_size, self.engine.kv.num_bytes

    def start(self, event_loop: asyncio.AbstractEventLoop) -> None:
        """Serve. Called from the event loop, like all that follows but for what is said to wait."""
        self._event_loop = event_loop
        self._expire_leases()
        self._last_turn = time.monotonic()
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    def submit(self, request: GenerationRequest, constraint: "Constraint | Exception | None" = None) -> Submitted:
        """`constraint` is that of the request's grammar, or why there is none."""
        if refused := self.refusal(request):
            return refused
        num_waiting = self._num_waiting
        self._lease_of[request.request_id] = request.lease
        self._incoming.append((request, constraint))
        self._wake.set()
        return Submitted(True, num_waiting=num_waiting)

    @property
    def _num_waiting(self) -> int:
        assert self.engine is not None
        return len(self.engine.scheduler.waiting) + len(self._incoming)

    def refusal(self, request: GenerationRequest) -> Submitted | None:
        """Why the request can't be taken now; None if it can."""
        if self.mailboxes.get(request.lease) is None or request.request_id in self._aborted:
            return Submitted(False, "dropped")
        if self.is_draining:
            return Submitted(False, "draining")
        # What another front has lost was admitted once, and is no more than that one had room for.
        is_full = self._num_waiting >= self.spec.engine.max_num_waiting or self._is_full_of_embeds(request)
        if is_full and not request.attempt:
            return Submitted(False, "full", self._num_waiting)
        return None

    def _is_full_of_embeds(self, request: GenerationRequest) -> bool:
        """A single prompt is always taken, however large."""
        if request.prompt_embeds is None:
            return False
        assert self.engine is not None
        waiting = [each.request for each in list(self.engine.scheduler.waiting)]
        waiting += [each for each, _ in list(self._incoming)]
        held = sum(len(each.prompt_embeds.data) for each in waiting if each.prompt_embeds)
        return held > 0 and held + len(request.prompt_embeds.data) > MAX_WAITING_EMBEDS_BYTES

    def constraint_of(self, grammar: str) -> "Constraint | Exception":
        """In a thread of its own, one call at a time. An exception is what its request ends with."""
        from actors.engine.constraint import Constraint
        from cluster.models.grammars import Grammars
        from cluster.models.hub import local_copy

        assert self.engine is not None
        try:
            if self._grammars is None:  # whoever never asks for one never pays for it
                self._grammars = Grammars(local_copy(self.spec.engine.model_path))
            return Constraint(self._grammars.compile(grammar), self.engine.model.spec.vocab_size)
        except Exception as error:
            return error

    def abort(self, request_ids: tuple[str, ...]) -> None:
        """A request that has not come yet is not taken when it comes: calls may overtake each other."""
        unknown = (request_id for request_id in request_ids if request_id not in self._lease_of)
        self._aborted |= dict.fromkeys(unknown, time.monotonic())
        self._tell(lambda engine: self._abort(engine, request_ids))

    def _abort(self, engine: "Engine", request_ids: tuple[str, ...]) -> None:
        for request_id in request_ids:
            engine.abort(request_id)
            self._lease_of.pop(request_id, None)

    def close_lease(self, lease: str) -> None:
        """Forget an ingress, and abort all that runs for it."""
        self.mailboxes.close(lease)
        self.abort(tuple(request_id for request_id, owner in tuple(self._lease_of.items()) if owner == lease))

    def _expire_leases(self) -> None:
        for lease in self.mailboxes.expire():
            logger.warning("%s has been silent for too long: its requests are aborted", lease)
            self.close_lease(lease)
        kept_since = time.monotonic() - ABORTED_S
        self._aborted = {name: since for name, since in self._aborted.items() if since >= kept_since}
        self._event_loop.call_later(EXPIRE_PERIOD_S, self._expire_leases)

    def settle(self) -> None:
        """Wait, in a thread, for the end of the step that is running. Raises TimeoutError."""
        self._between_steps(lambda engine: None)

    def check_integrity(self) -> None:
        """Let the engine's thread check itself between two steps, and raise here what it finds."""
        self._between_steps(_check_integrity)

    def _between_steps(self, command: "Callable[[Engine], None]") -> None:
        done: Future[None] = Future()

        def obey(engine: "Engine") -> None:
            try:
                command(engine)
                done.set_result(None)
            except Exception as error:
                done.set_exception(error)

        self._tell(obey)
        done.result(SETTLE_S)

    def _tell(self, command: "Callable[[Engine], None]") -> None:
        self._inbox.append(command)
        self._wake.set()

    def _run(self) -> None:
        engine = self.engine
        assert engine is not None
        num_failed = 0
        while num_failed < MAX_FAILED_TURNS and not engine.is_broken:
            try:
                self._turn(engine)
                num_failed, self._last_turn = 0, time.monotonic()
            except Exception:
                num_failed += 1
                logger.exception("the engine loop goes on after an unexpected error")
                time.sleep(FAILED_TURN_PAUSE_S)
        logger.critical("the engine will not recover: this front ends")
        self._give_up()

    def _turn(self, engine: "Engine") -> None:
        self._obey(engine)
        if engine.has_work:
            self._deliver(engine.step())
        else:
            self._wake.wait(IDLE_WAIT_S)

    def _obey(self, engine: "Engine") -> None:
        self._wake.clear()
        # A command is taken before requests are: those that came before it are then all there when it runs.
        commands = [self._inbox.popleft() for _ in range(len(self._inbox))]
        while self._incoming:
            self._take_in(engine, *self._incoming.popleft())
        for command in commands:
            try:
                command(engine)
            except Exception:  # those behind it are still to be obeyed
                logger.exception("a command to the engine has failed")

    def _take_in(
        self, engine: "Engine", request: GenerationRequest, constraint: "Constraint | Exception | None"
    ) -> None:
        from actors.engine.engine import failure

        try:
            if isinstance(constraint, Exception):
                raise constraint
            engine.add(request, constraint)
        except Exception as error:
            logger.exception("a request was not taken in", extra={"request_ids": [request.label]})
            engine.abort(request.request_id)
            self._deliver([failure(request.request_id, error)])

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        by_lease: dict[str, list[RequestOutput]] = defaultdict(list)
        for output in outputs:
            take = self._lease_of.pop if output.finish_reason else self._lease_of.get
            if lease := take(output.request_id, None):
                by_lease[lease].append(output)
        if by_lease:
            self._event_loop.call_soon_threadsafe(self._post, by_lease)

    def _post(self, by_lease: dict[str, list[RequestOutput]]) -> None:
        for lease, outputs in by_lease.items():
            if mailbox := self.mailboxes.get(lease):
                mailbox.put(outputs)

    def report(self) -> ActorReport:
        engine = self.engine
        if engine is None:
            return ActorReport(self.spec.actor_id, 0, 0)
        engine.publish_gauges()
        if self.remote:
            self.remote.publish_counters()
        version = self.remote.map_version if self.remote else 1
        return ActorReport(
            self.spec.actor_id,
            version,
            int(engine.expert_counts[0].sum()) // engine.model.spec.top_k,
            self.metrics.samples(),
            engine.expert_counts.numpy().copy(),
            self.remote.lane_names() if self.remote else "local",
            len(self._lease_of) + self.mailboxes.num_outputs,
            self.stuck_seconds,
        )

    @property
    def stuck_seconds(self) -> float:
        """Since the engine's thread has last ended a step, or looked for work; 0 before it serves."""
        return 0.0 if self._last_turn is None else time.monotonic() - self._last_turn


def _check_integrity(engine: "Engine") -> None:
    engine.check_integrity()
    assert not engine.has_work or engine.sequences, "the scheduler works for nobody"
