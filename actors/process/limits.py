"""What an actor asks of its own process: threads, priority and memory."""

import contextlib
import ctypes
import os
import resource
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import TypeVar

T = TypeVar("T")
# Where nothing less is allowed or good: a third of the weight of others.
LOW_PRIORITY = 5
# So long may others keep all cores for themselves. Then the work gets its share: the dead must be replaced.
IDLE_S = 5.0
MAX_FILES = 65536
# A front has two for each replica, and what Ray, torch and a checkpoint open.
FILES_PER_LINK, OTHER_FILES = 2, 256


def limit_threads(num_threads: int) -> None:
    """Use `num_threads` threads that sleep while they wait: fronts and replicas compute in turn on the same cores.

    Must be called before torch is imported: the OpenMP runtime reads its variables once.
    """
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(num_threads)
    os.environ["OMP_WAIT_POLICY"] = "passive"
    use_threads(num_threads)


def use_threads(num_threads: int) -> None:
    """Of torch, and of the native kernels, which have as many."""
    import torch

    torch.set_num_threads(num_threads)


def gently(work: Callable[[], T], *, while_serving: bool = False) -> T:
    """Run `work` at the lowest priority: an actor that joins under load must not hold up those that compute on its
    cores. `while_serving`: at low priority only, as threads that serve wait for this one's share of the interpreter.

    In a thread of its own, because on Linux each thread has its own priority, and a user may not raise one again.
    """
    is_idle = not while_serving and may_leave_idle()
    niceness, known = os.getpriority(os.PRIO_PROCESS, 0), _threads()
    with ThreadPoolExecutor(1) as pool:
        thread = pool.submit(_lower_priority, is_idle).result()
        done = pool.submit(work)
        if is_idle:
            wait([done], IDLE_S)
            _leave_idle(_threads() - known)
            _set_niceness(thread, LOW_PRIORITY)
        wait([done])
        for started in _threads() - known:  # they have inherited its priority, and may be there to compute
            _set_niceness(started, niceness)
        return done.result()


def _lower_priority(is_idle: bool) -> int:
    thread = threading.get_native_id()
    if is_idle:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    else:
        _set_niceness(thread, LOW_PRIORITY)
    return thread


def _set_niceness(thread: int, niceness: int) -> None:
    with contextlib.suppress(OSError, AttributeError):  # another system, not allowed, or it has ended
        os.setpriority(os.PRIO_PROCESS, thread, niceness)


def _leave_idle(threads: set[int]) -> None:
    for thread in threads:
        with contextlib.suppress(OSError):
            if os.sched_getscheduler(thread) == os.SCHED_IDLE:
                os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))


def _threads() -> set[int]:
    """Of this process, where the system tells."""
    with contextlib.suppress(OSError):
        return set(map(int, os.listdir("/proc/self/task")))
    return set()


@cache
def may_leave_idle() -> bool:
    """Whether a thread can go to SCHED_IDLE, where it runs only while nobody else wants to, and come back. Tried in a
    thread that ends: without the right to it, there is no way back.
    """
    with ThreadPoolExecutor(1) as pool, contextlib.suppress(OSError, AttributeError):
        pool.submit(os.sched_setscheduler, 0, os.SCHED_IDLE, os.sched_param(0)).result()
        pool.submit(os.sched_setscheduler, 0, os.SCHED_OTHER, os.sched_param(0)).result()
        return True
    return False


def raise_file_limit() -> None:
    """As far as a user may: a front holds two files open for each replica, a replica two for each front."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def lacking_files(num_links: int, limit: int) -> str | None:
    """What to do where so many links need more files than this process may open; None where they fit."""
    needed = FILES_PER_LINK * num_links + OTHER_FILES
    if limit == resource.RLIM_INFINITY or needed <= limit:
        return None
    return (
        f"{num_links} replicas need about {needed} open files, and this process may have {limit}: raise the hard limit "
        f"of Ray's node (`ulimit -Hn {needed}` before `ray start`, or LimitNOFILE of its service)"
    )


def file_limit() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def release_free_memory() -> None:
    """Give memory that loading has freed back to the system; glibc keeps it otherwise."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)
