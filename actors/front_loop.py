"""The thread that owns a front's engine, and the mailboxes its outputs wait in. Knows no Ray."""

import asyncio
import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING

from actors.process import release_free_memory
from cluster.expert_map import ExpertMap
from cluster.messages import ActorReport, FrontSpec, GenerationRequest, LoadProgress, RequestOutput, Submitted
from cluster.metrics import Metrics

if TYPE_CHECKING:
    from actors.engine.engine import Engine
    from actors.lanes.remote import RemoteDispatcher

logger = logging.getLogger(__name__)

# An ingress polls all the time. One that is silent for this long is gone, and so are its clients.
INGRESS_LEASE_S = 30.0
IDLE_WAIT_S = 1.0
SETTLE_S = 30.0


class Mailbox:
    """Outputs for one ingress. Belongs to the event loop."""

    def __init__(self) -> None:
        self._outputs: list[RequestOutput] = []
        self._filled = asyncio.Event()
        self.last_seen = time.monotonic()

    def put(self, outputs: list[RequestOutput]) -> None:
        self._outputs += outputs
        self._filled.set()

    @property
    def num_waiting(self) -> int:
        return len(self._outputs)

    async def take(self, timeout: float) -> tuple[RequestOutput, ...]:
        self.last_seen = time.monotonic()
        try:
            await asyncio.wait_for(self._filled.wait(), timeout)
        except TimeoutError:
            return ()
        finally:
            self.last_seen = time.monotonic()
        outputs, self._outputs = tuple(self._outputs), []
        self._filled.clear()
        return outputs


class FrontLoop:
    def __init__(self, spec: FrontSpec, namespace: str) -> None:
        self.spec = spec
        self.namespace = namespace
        self.metrics = Metrics()
        self.engine: Engine | None = None
        self.remote: RemoteDispatcher | None = None
        self.progress = LoadProgress()
        # Filled by the event loop, emptied by the engine's thread: requests first, so that an abort finds its request.
        self._incoming: deque[GenerationRequest] = deque()
        self._inbox: deque[Callable[[Engine], None]] = deque()
        self._wake = threading.Event()
        self._ingress_of: dict[str, str] = {}
        self._mailboxes: dict[str, Mailbox] = {}
        self.is_draining = False

    def load(self) -> tuple[int, int, int]:
        """Returns bytes of weights, tokens and bytes of the KV cache."""
        from actors.front_builder import build_engine

        built = build_engine(self.spec, self.namespace, self.metrics, self._advance)
        self.engine, self.remote = built.engine, built.remote
        release_free_memory()
        kv = built.engine.kv
        return built.weight_bytes, kv.num_blocks * kv.block_size, kv.num_bytes

    def _advance(self, progress: LoadProgress) -> None:
        self.progress = progress

    def set_expert_map(self, expert_map: ExpertMap) -> None:
        if self.remote:
            self.remote.set_map(expert_map)

    def warm_up(self) -> None:
        """See Engine.warm_up. Called before the thread starts."""
        assert self.engine is not None
        self.engine.warm_up()

    def start(self, event_loop: asyncio.AbstractEventLoop, mailboxes: dict[str, Mailbox]) -> None:
        self._event_loop = event_loop
        self._mailboxes = mailboxes
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    def submit(self, request: GenerationRequest) -> Submitted:
        assert self.engine is not None
        if request.request_id in self._ingress_of:
            return Submitted(True)  # asked twice, because the first answer was lost
        if self.is_draining:
            return Submitted(False, "draining")
        num_waiting = len(self.engine.scheduler.waiting) + len(self._incoming)
        if num_waiting >= self.spec.engine.max_num_waiting:
            return Submitted(False, "full", num_waiting)
        self._ingress_of[request.request_id] = request.ingress_id
        self._incoming.append(request)
        self._wake.set()
        return Submitted(True, num_waiting=num_waiting)

    def abort(self, request_ids: tuple[str, ...]) -> None:
        self._tell(lambda engine: self._abort(engine, request_ids))

    def _abort(self, engine: "Engine", request_ids: tuple[str, ...]) -> None:
        for request_id in request_ids:
            engine.abort(request_id)
            self._ingress_of.pop(request_id, None)

    def settle(self) -> None:
        """Wait for the end of the step that is running. Raises TimeoutError."""
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
        while True:
            try:
                self._obey(engine)
                if engine.has_work:
                    self._deliver(engine.step())
                else:
                    self._wake.wait(IDLE_WAIT_S)
                self._drop_lost_ingresses(engine)
            except Exception:
                logger.exception("the engine loop goes on after an unexpected error")
                time.sleep(0.1)

    def _obey(self, engine: "Engine") -> None:
        self._wake.clear()
        # A command is taken before requests are: those that came before it are then all there when it runs.
        commands = [self._inbox.popleft() for _ in range(len(self._inbox))]
        while self._incoming:
            engine.add(self._incoming.popleft())
        for command in commands:
            command(engine)

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        by_ingress: dict[str, list[RequestOutput]] = defaultdict(list)
        for output in outputs:
            take = self._ingress_of.pop if output.finish_reason else self._ingress_of.get
            if ingress_id := take(output.request_id, None):
                by_ingress[ingress_id].append(output)
        if by_ingress:
            self._event_loop.call_soon_threadsafe(self._post, by_ingress)

    def _post(self, by_ingress: dict[str, list[RequestOutput]]) -> None:
        for ingress_id, outputs in by_ingress.items():
            if mailbox := self._mailboxes.get(ingress_id):
                mailbox.put(outputs)

    def _drop_lost_ingresses(self, engine: "Engine") -> None:
        limit = time.monotonic() - INGRESS_LEASE_S
        lost = {name for name, mailbox in tuple(self._mailboxes.items()) if mailbox.last_seen < limit}
        for ingress_id in lost:
            orphans = tuple(r for r, owner in tuple(self._ingress_of.items()) if owner == ingress_id)
            logger.warning("ingress %s is gone: %d requests aborted", ingress_id, len(orphans))
            self._abort(engine, orphans)
            self._mailboxes.pop(ingress_id, None)

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
            int(engine.expert_counts[0].sum()) // engine.model.config.num_experts_per_tok,
            self.metrics.samples(),
            tuple(tuple(layer) for layer in engine.expert_counts.tolist()),
            self.remote.lane_names() if self.remote else "local",
            len(self._ingress_of) + sum(mailbox.num_waiting for mailbox in tuple(self._mailboxes.values())),
        )


def _check_integrity(engine: "Engine") -> None:
    engine.check_integrity()
    assert not engine.has_work or engine.sequences, "the scheduler works for nobody"
