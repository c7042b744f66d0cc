"""What an actor asks of its own process: threads and memory."""

import contextlib
import ctypes
import os


def limit_threads(num_threads: int) -> None:
    """Use `num_threads` threads that sleep while they wait: fronts and replicas compute in turn on the same cores.

    Must be called before torch is imported: the OpenMP runtime reads its variables once.
    """
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(num_threads)
    os.environ["OMP_WAIT_POLICY"] = "passive"
    import torch

    torch.set_num_threads(num_threads)


def release_free_memory() -> None:
    """Give memory that loading has freed back to the system; glibc keeps it otherwise."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)
