"""Low priority while loading, and only there."""

import os
import threading

from actors.process import LOW_PRIORITY, gently


def priority() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def test_loading_is_gentle_and_what_comes_after_is_not() -> None:
    before = priority()
    assert gently(priority) == max(before, LOW_PRIORITY)
    assert priority() == before
