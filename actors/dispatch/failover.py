"""When a replica counts as too slow or lost, and when it is asked again. Plain numbers, no sockets."""

import time
from collections.abc import Callable, Iterable

# No dispatch is hedged earlier than this: schedulers and garbage collectors cause pauses of this size.
DEADLINE_FLOOR_S = 0.1
DEADLINE_FACTOR = 8.0
# Before anything has been observed.
FIRST_DEADLINE_S = 5.0
# At most, for a number of tokens that was not observed yet, unless fewer take as long: what is extrapolated from one
# token to hundreds comes to minutes.
GUESSED_DEADLINE_S = 1.0
SMOOTHING = 0.2
# Computing a part in the front costs more than waiting a little longer for the last replica that may answer.
LAST_DEADLINE_S, LAST_DEADLINE_FACTOR = 1.0, 3.0
REPROBE_S = (0.25, 5.0)  # first and longest pause between probes of a replica that was given up
# A replica that is given up again so soon after it was taken back is left alone for longer.
RELAPSE_S = 10.0
# Messages sent a second time because the first was late: this share of all, and a few more at once. A replica that
# hangs has few messages; when all are late, more messages make all later.
HEDGE_SHARE, HEDGE_BURST = 0.1, 8.0


class Latency:
    """Smoothed answer times of each replica, by the power of two of the number of tokens."""

    def __init__(self) -> None:
        self._seconds: dict[str, dict[int, float]] = {}

    def observe(self, replica_id: str, num_tokens: int, seconds: float, times: int = 1) -> None:
        """An answer counts for its deadline at most: a replica that was frozen for a minute is not that slow. `times`:
        as many answers took about as long.
        """
        seconds = min(seconds, self.deadline((replica_id,), num_tokens))
        bucket = num_tokens.bit_length()
        known = self._seconds.setdefault(replica_id, {})
        before = known.get(bucket, seconds)
        known[bucket] = seconds + (1 - SMOOTHING) ** times * (before - seconds)

    def between(self, replica_id: str, num_tokens: int, least: float, most: float) -> None:
        """An answer has taken so long. Within these bounds, what was expected is believed."""
        known = self._seconds.get(replica_id)
        expected = _expected(known, num_tokens) if known else least
        self.observe(replica_id, num_tokens, min(max(expected, least), most))

    def at_least(self, replica_id: str, num_tokens: int, seconds: float) -> None:
        """No answer has come for so long. Says nothing of a replica that is not expected to be faster."""
        if DEADLINE_FACTOR * seconds > self.deadline((replica_id,), num_tokens):
            self.observe(replica_id, num_tokens, seconds)

    def deadline(self, replica_ids: Iterable[str], num_tokens: int) -> float:
        """Seconds after which a dispatch is hedged: a multiple of what it takes the fastest of these replicas."""
        known = [self._seconds[r] for r in replica_ids if r in self._seconds] or list(self._seconds.values())
        if not known:
            return FIRST_DEADLINE_S
        return max(DEADLINE_FLOOR_S, DEADLINE_FACTOR * min(_expected(one, num_tokens) for one in known))

    def patience(self, replica_ids: Iterable[str], num_tokens: int, may_hedge: bool) -> float:
        """Seconds after which a message counts as late; longer for one that is not to be sent to another replica."""
        deadline = self.deadline(replica_ids, num_tokens)
        return deadline if may_hedge else max(LAST_DEADLINE_S, LAST_DEADLINE_FACTOR * deadline)

    def keep_only(self, replica_ids: set[str]) -> None:
        for replica_id in self._seconds.keys() - replica_ids:
            del self._seconds[replica_id]


def _expected(seconds: dict[int, float], num_tokens: int) -> float:
    bucket = num_tokens.bit_length()
    if bucket in seconds:
        return seconds[bucket]
    nearest = min(seconds, key=lambda known: (abs(known - bucket), known))
    # A larger batch may take longer in proportion; a smaller one must not be expected to be faster.
    in_proportion = seconds[nearest] * 2.0 ** max(0, bucket - nearest)
    return max(seconds[nearest], min(in_proportion, GUESSED_DEADLINE_S / DEADLINE_FACTOR))


class HedgeBudget:
    """How many messages may now be sent a second time. False when none may."""

    def __init__(self, share: float = HEDGE_SHARE) -> None:
        self._share = share
        self._left = HEDGE_BURST if share else 0.0

    def __bool__(self) -> bool:
        return self._left >= 1

    def earn(self, times: int = 1) -> None:
        """So many messages were sent for the first time."""
        self._left = min(HEDGE_BURST, self._left + times * self._share)

    def spend(self) -> None:
        self._left -= 1


class Breaker:
    """Replicas that were given up, and when each is to be probed. A successful probe takes it back."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pause: dict[str, float] = {}
        self._due: dict[str, float] = {}
        self._closed: dict[str, tuple[float, float]] = {}  # when it was taken back, and its pause then

    def __bool__(self) -> bool:
        return bool(self._due)

    def is_open(self, replica_id: str) -> bool:
        return replica_id in self._due

    def open(self, replica_id: str) -> bool:
        """Give a replica up; True if it was not given up before."""
        if replica_id in self._due:
            return False
        closed_at, pause = self._closed.pop(replica_id, (0.0, 0.0))
        has_relapsed = pause and self._clock() - closed_at < RELAPSE_S
        self._pause[replica_id] = min(2 * pause, REPROBE_S[1]) if has_relapsed else REPROBE_S[0]
        self._due[replica_id] = self._clock() + self._pause[replica_id]
        return True

    def close(self, replica_id: str) -> None:
        if self._due.pop(replica_id, None) is not None:
            self._closed[replica_id] = self._clock(), self._pause.pop(replica_id)

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
        for known in (self._due, self._pause, self._closed):
            for replica_id in known.keys() - replica_ids:
                del known[replica_id]
