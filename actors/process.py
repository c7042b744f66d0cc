"""What an actor asks of its own process: threads, priority and memory."""

import contextlib
import ctypes
import os
import resource
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
# A third of the weight of others: low enough not to be felt, high enough that the dead are soon replaced.
LOW_PRIORITY = 5
MAX_FILES = 65536


def limit_threads(num_threads: int) -> None:
    """Use `num_threads` threads that sleep while they wait: fronts and replicas compute in turn on the same cores.

    Must be called before torch is imported: the OpenMP runtime reads its variables once.
    """
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(num_threads)
    os.environ["OMP_WAIT_POLICY"] = "passive"
    import torch

    torch.set_num_threads(num_threads)


def gently(work: Callable[[], T]) -> T:
    """Run `work` at low priority: a replica that joins under load must not hold up those that compute on its cores.

    In a thread of its own, because only the superuser may raise a priority again (on Linux each thread has its own).
    """
    with ThreadPoolExecutor(1, initializer=_lower_priority) as pool:
        return pool.submit(work).result()


def _lower_priority() -> None:
    with contextlib.suppress(OSError, AttributeError):  # another system
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOW_PRIORITY)


def raise_file_limit() -> None:
    """As far as a user may: a front holds two files open for each replica, a replica two for each front."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def release_free_memory() -> None:
    """Give memory that loading has freed back to the system; glibc keeps it otherwise."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)
