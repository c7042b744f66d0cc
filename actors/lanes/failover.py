"""When a replica counts as too slow or lost, and when it is asked again. Plain numbers, no sockets."""

import time
from collections.abc import Callable

# No dispatch is hedged earlier than this: schedulers and garbage collectors cause pauses of this size.
DEADLINE_FLOOR_S = 0.1
DEADLINE_FACTOR = 8.0
# Before anything has been observed.
FIRST_DEADLINE_S = 5.0
SMOOTHING = 0.2
REPROBE_S = (0.25, 5.0)  # first and longest pause between probes of a replica that was given up


class Latency:
    """Smoothed answer times, by the power of two of the number of tokens."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}

    def observe(self, num_tokens: int, seconds: float) -> None:
        bucket = num_tokens.bit_length()
        before = self._seconds.get(bucket, seconds)
        self._seconds[bucket] = before + SMOOTHING * (seconds - before)

    def deadline(self, num_tokens: int) -> float:
        """Seconds after which a dispatch is hedged: a multiple of what such a dispatch takes."""
        bucket = num_tokens.bit_length()
        if bucket in self._seconds:
            return max(DEADLINE_FLOOR_S, DEADLINE_FACTOR * self._seconds[bucket])
        if not self._seconds:
            return FIRST_DEADLINE_S
        nearest = min(self._seconds, key=lambda known: (abs(known - bucket), known))
        # A larger batch may take longer in proportion; a smaller one must not be expected to be faster.
        expected = self._seconds[nearest] * 2.0 ** max(0, bucket - nearest)
        return max(DEADLINE_FLOOR_S, DEADLINE_FACTOR * expected)


class Breaker:
    """Replicas that were given up, and when each is to be probed. A successful probe takes it back."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pause: dict[str, float] = {}
        self._due: dict[str, float] = {}

    def __bool__(self) -> bool:
        return bool(self._due)

    def is_open(self, replica_id: str) -> bool:
        return replica_id in self._due

    def open(self, replica_id: str) -> bool:
        """Give a replica up; True if it was not given up before."""
        is_new = replica_id not in self._due
        if is_new:
            self._pause[replica_id] = REPROBE_S[0]
            self._due[replica_id] = self._clock() + REPROBE_S[0]
        return is_new

    def close(self, replica_id: str) -> None:
        self._pause.pop(replica_id, None)
        self._due.pop(replica_id, None)

    def take_due(self) -> list[str]:
        """Replicas to probe now; each is due again after twice its last pause."""
        now = self._clock()
        due = [replica_id for replica_id, at in self._due.items() if at <= now]
        for replica_id in due:
            self._pause[replica_id] = min(2 * self._pause[replica_id], REPROBE_S[1])
            self._due[replica_id] = now + self._pause[replica_id]
        return due

    def keep_only(self, replica_ids: set[str]) -> None:
        """Forget replicas that have left the map."""
        for replica_id in set(self._due) - replica_ids:
            self.close(replica_id)
