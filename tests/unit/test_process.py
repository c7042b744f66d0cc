"""The lowest priority while loading, and only there; as many files as a process may have."""

import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

from actors.process import limits as process
from actors.process.limits import LOW_PRIORITY, gently, lacking_files, may_leave_idle


def priority() -> tuple[int, int]:
    """Scheduling policy and niceness of the calling thread."""
    return os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def a_thread_that_stays(ended: threading.Event) -> Callable[[], int]:
    """Starts it, waits until it runs, and returns its number."""

    def start() -> int:
        runs = threading.Event()
        thread = threading.Thread(target=lambda: (runs.set(), ended.wait()), daemon=True)
        thread.start()
        runs.wait()
        assert thread.native_id
        return thread.native_id

    return start


def test_loading_is_gentle_and_what_comes_after_is_not() -> None:
    before = priority()
    lowest = (os.SCHED_IDLE, before[1]) if may_leave_idle() else (before[0], max(before[1], LOW_PRIORITY))
    assert gently(priority) == lowest
    low = (before[0], max(before[1], LOW_PRIORITY))
    assert gently(priority, while_serving=True) == low
    assert priority() == before


@pytest.mark.skipif(not may_leave_idle(), reason="this user may not raise a priority again")
@pytest.mark.parametrize("while_serving", [False, True])
def test_threads_that_loading_has_started_are_not_left_behind(while_serving: bool) -> None:
    before = priority()
    ended = threading.Event()
    thread = gently(a_thread_that_stays(ended), while_serving=while_serving)
    assert (os.sched_getscheduler(thread), os.getpriority(os.PRIO_PROCESS, thread)) == before
    ended.set()


def test_who_gets_no_core_for_long_gets_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "IDLE_S", 0.0)

    def look_until_it_has_changed() -> int:
        while priority()[0] == os.SCHED_IDLE:
            pass
        return priority()[0]

    assert gently(look_until_it_has_changed) == os.SCHED_OTHER


def test_a_user_who_may_not_come_back_never_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "may_leave_idle", lambda: False)
    policy, niceness = gently(priority)
    assert (policy, niceness) == (os.SCHED_OTHER, max(priority()[1], LOW_PRIORITY))


def test_exceptions_of_the_work_come_through() -> None:
    with pytest.raises(ZeroDivisionError):
        gently(lambda: 1 // 0)


def test_the_limit_of_open_files_is_raised_as_far_as_a_user_may() -> None:
    code = "import resource as r, actors.process.limits as p; r.setrlimit(r.RLIMIT_NOFILE, (64, 512))"
    code += "; p.raise_file_limit(); print(*r.getrlimit(r.RLIMIT_NOFILE)); p.raise_file_limit()"
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert hard == resource.RLIM_INFINITY or hard >= 512
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["512", "512"]


@pytest.mark.parametrize(("num_links", "limit"), [(1000, 65536), (1, 1024), (10_000, resource.RLIM_INFINITY)])
def test_links_that_fit_need_no_word(num_links: int, limit: int) -> None:
    assert lacking_files(num_links, limit) is None


def test_a_limit_that_is_too_low_for_the_links_is_named_with_the_one_that_would_do() -> None:
    told = lacking_files(2000, 4096)
    assert told is not None
    assert "2000 replicas" in told
    assert "may have 4096" in told
    assert "ulimit -Hn 4256" in told
