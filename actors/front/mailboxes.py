"""What steps have added for each ingress and the ingress has not acknowledged yet. Belongs to the actor's event loop.

An ingress opens a mailbox under a lease, a name that it never uses again, and polls it. Outputs are numbered from 1,
and each poll says up to which number they have arrived: an answer that was lost on its way is given again. A lease that
nobody polls for a while ends, and whoever polls it later is told so, instead of waiting for what will never come.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace

from cluster.messages.requests import Delivery, RequestOutput

# An ingress polls all the time. One that is silent for this long is gone, and so are its clients.
LEASE_S = 30.0
# What a message holds of them: packing and unpacking one keeps a process from all else for some milliseconds.
MAX_LOGPROBS = 5000

Clock = Callable[[], float]


class Mailbox:
    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._outputs: deque[RequestOutput] = deque()
        self._num_acknowledged = 0
        self._filled = asyncio.Event()
        self.last_seen = clock()

    @property
    def num_outputs(self) -> int:
        return len(self._outputs)

    def put(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            self._outputs += _in_parts(output)
        self._filled.set()

    async def take(self, acknowledged: int, timeout: float) -> Delivery:
        """Forget outputs up to the number `acknowledged`, and give later ones once there are any: all, or as many as a
        message may hold.
        """
        self.last_seen = self._clock()
        self._forget(acknowledged)
        try:  # not wait_for(), which begins to wait only in a later turn: another poll may have emptied the box by then
            async with asyncio.timeout(timeout):
                await self._filled.wait()
        except TimeoutError:
            pass
        finally:
            self.last_seen = self._clock()
        return Delivery(self._num_acknowledged + 1, tuple(self._first_outputs()))

    def _first_outputs(self) -> Iterator[RequestOutput]:
        room = MAX_LOGPROBS
        for n, output in enumerate(self._outputs):
            room -= output.num_logprobs
            if n and room < 0:
                return
            yield output

    def _forget(self, acknowledged: int) -> None:
        while self._outputs and self._num_acknowledged < acknowledged:
            self._outputs.popleft()
            self._num_acknowledged += 1
        if not self._outputs:
            self._filled.clear()


def _in_parts(output: RequestOutput) -> list[RequestOutput]:
    """One output, or several of which none has too many log-probabilities."""
    scores = output.prompt_logprobs or ()
    if output.num_logprobs <= MAX_LOGPROBS or len(scores) < 2:
        return [output]
    size = max(1, MAX_LOGPROBS * len(scores) // output.num_logprobs)
    *parts, last = (scores[at : at + size] for at in range(0, len(scores), size))
    firsts = [RequestOutput(output.request_id, prompt_logprobs=part, is_part=True) for part in parts]
    return [*firsts, replace(output, prompt_logprobs=last)]


class Mailboxes:
    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._by_lease: dict[str, Mailbox] = {}

    @property
    def num_outputs(self) -> int:
        return sum(mailbox.num_outputs for mailbox in tuple(self._by_lease.values()))

    def open(self, lease: str) -> None:
        self._by_lease.setdefault(lease, Mailbox(self._clock))

    def get(self, lease: str) -> Mailbox | None:
        """None if the lease has ended."""
        return self._by_lease.get(lease)

    def close(self, lease: str) -> None:
        self._by_lease.pop(lease, None)

    def expire(self) -> list[str]:
        """End the leases that nobody has polled for LEASE_S; returns them."""
        limit = self._clock() - LEASE_S
        lost = [lease for lease, mailbox in self._by_lease.items() if mailbox.last_seen < limit]
        for lease in lost:
            self.close(lease)
        return lost
