"""A front as its handle shows it, with real mailboxes and without a model: it says what it is told to say."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

from ray.exceptions import ActorDiedError, ActorUnavailableError

from actors.front.mailboxes import Mailboxes
from cluster.messages.requests import Delivery, FinishReason, GenerationRequest, RequestOutput, Submitted
from cluster.messages.state import ClusterState

LOST = ActorUnavailableError("lost", None)
ACCEPTED, FULL, DRAINING = Submitted(True), Submitted(False, "full"), Submitted(False, "draining")
POLL_S = 0.05


class FakeFront:
    """Answers submit() with `answers`, the last one again and again. `before["poll"]` and the like are called with the
    method's arguments before it answers, and may raise; with an event in `wait["poll"]` it hangs until that is set.
    """

    def __init__(self, *answers: Submitted | Exception) -> None:
        self.answers = list(answers or (ACCEPTED,))
        self.taken: list[GenerationRequest] = []
        self.offered: list[GenerationRequest] = []
        self.aborted: list[str] = []
        self.closed: list[str] = []
        self.mailboxes = Mailboxes()
        self.before: dict[str, Callable[..., Any]] = {}
        self.after: dict[str, Callable[..., Any]] = {}
        self.wait: dict[str, asyncio.Event] = {}
        self.num_waiting: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        method: Callable[..., Awaitable[Any]] = object.__getattribute__(self, f"do_{name}")

        async def call(*args: Any) -> Any:
            await asyncio.sleep(0)
            if hook := self.before.get(name):
                hook(*args)
            if event := self.wait.get(name):
                self.num_waiting[name] += 1
                await event.wait()
            answer = await method(*args)
            if hook := self.after.get(name):
                hook(*args)
            return answer

        return SimpleNamespace(remote=call)

    async def do_open(self, lease: str) -> None:
        self.mailboxes.open(lease)

    async def do_close(self, lease: str) -> None:
        self.closed.append(lease)
        self.mailboxes.close(lease)

    async def do_submit(self, request: GenerationRequest) -> Submitted:
        self.offered.append(request)
        if self.mailboxes.get(request.lease) is None:
            return Submitted(False, "dropped")
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        if answer.accepted:
            self.taken.append(request)
        return answer

    async def do_abort(self, request_ids: tuple[str, ...]) -> None:
        self.aborted += request_ids

    async def do_poll(self, lease: str, acknowledged: int) -> Delivery | None:
        mailbox = self.mailboxes.get(lease)
        return await mailbox.take(acknowledged, POLL_S) if mailbox else None

    def die(self) -> None:
        """From now on whatever is asked of it fails."""

        def fail(*args: Any) -> None:
            raise ActorDiedError

        self.before |= dict.fromkeys(("poll", "submit", "abort", "close", "open"), fail)

    def say(self, request: GenerationRequest, *tokens: int, end: FinishReason | None = None, **fields: Any) -> None:
        """What a step adds to a sequence."""
        mailbox = self.mailboxes.get(request.lease)
        assert mailbox is not None
        mailbox.put([RequestOutput(request.request_id, tokens, finish_reason=end, **fields)])


def fronts_state(**fronts: FakeFront) -> ClusterState:
    return ClusterState("ready", "ready", "test", fronts=tuple(fronts))
