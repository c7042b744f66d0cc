"""FrontActor: a thin Ray class around Engine.

The engine runs in a thread of its own; the actor's event loop takes requests in and hands outputs out. Outputs wait
in one mailbox per ingress, so a step sends at most one message to each ingress.
torch is imported when an actor starts, so that the supervisor can name this class without loading it.
"""

import asyncio
import time

from actors.expert import where_am_i
from actors.front_loop import FrontLoop, Mailbox
from actors.lease import hold_lease
from actors.process import gently, limit_threads
from cluster.expert_map import ExpertMap, Identity
from cluster.logs import set_up_logs
from cluster.messages import (
    ActorReport,
    FrontSpec,
    GenerationRequest,
    LoadProgress,
    ReadyReport,
    RequestOutput,
    Submitted,
    Wanted,
)

POLL_S = 10.0


class FrontActor:
    def __init__(self, spec: FrontSpec, namespace: str) -> None:
        gently(lambda: limit_threads(spec.engine.num_threads))
        set_up_logs(spec.actor_id, spec.logs.style, spec.logs.level)
        self.spec = spec
        self.loop = FrontLoop(spec, namespace)
        self.mailboxes: dict[str, Mailbox] = {}
        self.ready: ReadyReport | None = None
        self.expert_map: ExpertMap | None = None
        self.wanted: Wanted | None = None
        self.lease = hold_lease(namespace)

    async def load(self) -> ReadyReport:
        """Read the front's weights and size its KV cache. Serving starts with start()."""
        started = time.monotonic()
        weight_bytes, kv_tokens, kv_bytes = await asyncio.to_thread(gently, self.loop.load)
        seconds = time.monotonic() - started
        self.ready = ReadyReport(self.spec.actor_id, *where_am_i(), weight_bytes, seconds, kv_tokens, kv_bytes)
        return self.ready

    async def start(self, expert_map: ExpertMap, wanted: Wanted | None = None) -> None:
        """Take the first map, compute one token through all layers to see that it works, and serve."""
        await self.set_expert_map(expert_map, wanted)
        await asyncio.to_thread(self.loop.warm_up)
        self.loop.start(asyncio.get_running_loop(), self.mailboxes)

    async def identity(self) -> Identity | None:
        """For a supervisor that has not started this actor; None while it can't serve."""
        if self.ready is None or self.expert_map is None:
            return None
        return Identity(self.spec, self.ready, self.expert_map, self.wanted, self.loop.is_draining)

    async def set_expert_map(self, expert_map: ExpertMap, wanted: Wanted | None = None) -> None:
        """`wanted` is kept for a successor of the supervisor."""
        self.expert_map = expert_map
        self.wanted = wanted or self.wanted
        await asyncio.to_thread(self.loop.set_expert_map, expert_map)

    async def settle(self) -> None:
        """Return once the step that is running has ended: from then on nothing is routed by an older map."""
        await asyncio.to_thread(self.loop.settle)

    async def drain(self) -> None:
        """Accept no more requests; report() tells when the last one has ended."""
        self.loop.is_draining = True

    async def submit(self, request: GenerationRequest) -> Submitted:
        self._mailbox(request.ingress_id)
        return self.loop.submit(request)

    async def abort(self, request_ids: tuple[str, ...]) -> None:
        self.loop.abort(request_ids)

    async def poll(self, ingress_id: str) -> tuple[RequestOutput, ...]:
        """What steps have added for this ingress since it last asked; waits until there is something."""
        return await self._mailbox(ingress_id).take(POLL_S)

    def _mailbox(self, ingress_id: str) -> Mailbox:
        return self.mailboxes.setdefault(ingress_id, Mailbox())

    async def progress(self) -> LoadProgress:
        return self.loop.progress

    async def report(self) -> ActorReport:
        self.lease.renew()
        return self.loop.report()

    async def check_integrity(self) -> None:
        """Raise AssertionError if the engine has leaked a sequence or a KV block."""
        await asyncio.to_thread(self.loop.check_integrity)
