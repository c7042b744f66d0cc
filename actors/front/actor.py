"""FrontActor: a thin Ray class around Engine.

The engine runs in a thread of its own; the actor's event loop takes requests in and hands outputs out. Outputs wait
in one mailbox per ingress (actors/front/mailboxes.py), so a step sends at most one message to each ingress.
torch is imported when an actor starts, so that the supervisor can name this class without loading it.
"""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from actors.front.loop import FrontLoop
from actors.process.limits import gently, limit_threads
from actors.process.orphan import watch_for_orphanhood
from actors.process.place import where_am_i
from actors.process.readiness import show_ready
from cluster.expert_map import ExpertMap, MapChange, newest
from cluster.logs import set_up_logs
from cluster.messages.actors import ActorReport, FrontSpec, Identity, Legacy, LoadProgress, ReadyReport
from cluster.messages.requests import Delivery, GenerationRequest, Submitted

POLL_S = 10.0


class FrontActor:
    def __init__(self, spec: FrontSpec, namespace: str) -> None:
        gently(lambda: limit_threads(spec.engine.num_threads))
        set_up_logs(spec.actor_id, spec.logs.style, spec.logs.level)
        self.spec = spec
        self.loop = FrontLoop(spec, namespace)
        self.ready: ReadyReport | None = None
        self.expert_map: ExpertMap | None = None
        self.legacy: Legacy | None = None
        self._compiling = ThreadPoolExecutor(1, "grammars")
        self.supervision = watch_for_orphanhood(namespace)

    async def load(self) -> ReadyReport:
        """Read the front's weights. Serving starts with start()."""
        started = time.monotonic()
        weight_bytes = await asyncio.to_thread(gently, self.loop.load)
        self.loaded = ReadyReport(self.spec.actor_id, *where_am_i(), weight_bytes, time.monotonic() - started)
        return self.loaded

    async def start(
        self, expert_map: ExpertMap, legacy: Legacy | None = None, others: tuple[int, ...] = ()
    ) -> ReadyReport:
        """Take the first map, size the KV cache, compute one token through all layers to see that it works, and serve.

        `others` are the KV caches of the other fronts on this node, in bytes; 0 for one that starts as well.
        """
        await self.set_expert_map(expert_map, legacy)
        kv_tokens, kv_bytes = await asyncio.to_thread(self.loop.warm_up, others)
        self.loop.start(asyncio.get_running_loop())
        self.ready = replace(self.loaded, kv_cache_tokens=kv_tokens, kv_cache_bytes=kv_bytes)
        show_ready(self.spec.actor_id)
        return self.ready

    async def identity(self) -> Identity | None:
        """For a supervisor that has not started this actor; None while it can't serve."""
        if self.ready is None or self.expert_map is None:
            return None
        return Identity(self.spec, self.ready, self.expert_map, self.legacy, self.loop.is_draining)

    async def set_expert_map(self, news: ExpertMap | MapChange, legacy: Legacy | None = None) -> int:
        """The version that counts now. `legacy` is kept for a successor of the supervisor. Raises ValueError if what
        changes is not the map here.
        """
        expert_map = newest(self.expert_map, news)
        self.expert_map = expert_map
        self.legacy = legacy or self.legacy
        await asyncio.to_thread(self.loop.set_expert_map, expert_map)
        return expert_map.version

    async def settle(self) -> None:
        """Return once the step that is running has ended: from then on nothing is routed by an older map."""
        await asyncio.to_thread(self.loop.settle)

    async def drain(self) -> None:
        """Accept no more requests; report() tells when the last one has ended."""
        self.loop.is_draining = True

    async def open(self, lease: str) -> None:
        """Begin to keep outputs for an ingress, until it closes the lease or does not poll for LEASE_S."""
        self.loop.mailboxes.open(lease)

    async def close(self, lease: str) -> None:
        """End a lease, and abort what runs for it."""
        self.loop.close_lease(lease)

    async def submit(self, request: GenerationRequest) -> Submitted:
        if request.params.grammar is None:
            return self.loop.submit(request)
        if refused := self.loop.refusal(request):  # or a front that is full would compile what it does not take
            return refused
        compiling = asyncio.get_running_loop().run_in_executor(
            self._compiling, self.loop.constraint_of, request.params.grammar
        )
        return self.loop.submit(request, await compiling)

    async def abort(self, request_ids: tuple[str, ...]) -> None:
        self.loop.abort(request_ids)

    async def poll(self, lease: str, acknowledged: int) -> Delivery | None:
        """What steps have added behind the number `acknowledged`; waits until there is something. None: the lease has
        ended, and everything that ran under it.
        """
        mailbox = self.loop.mailboxes.get(lease)
        return await mailbox.take(acknowledged, POLL_S) if mailbox else None

    async def progress(self) -> LoadProgress:
        return self.loop.progress

    async def report(self) -> ActorReport:
        self.supervision.hear()
        return self.loop.report()

    async def check_integrity(self) -> None:
        """Raise AssertionError if the engine has leaked a sequence or a KV block."""
        await asyncio.to_thread(self.loop.check_integrity)
