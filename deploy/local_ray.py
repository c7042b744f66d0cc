"""The Ray cluster that `outcrop serve` runs on: the one that is reachable, or one of its own for as long as it runs."""

import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 128 * 2**20
END_S = 15.0

# Environment of a Ray that we start. Variables that are set already win.
SETTINGS = {
    "RAY_max_direct_call_object_size": str(4 * 2**20),  # token batches travel inside the RPC
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
}


@contextmanager
def ray_cluster() -> Iterator[bool]:
    """Connect to Ray or start it; yields True if it is our own. Our own leaves no process and no file behind."""
    address = reachable_address()
    if address is None:
        with own_ray():
            yield True
        return
    import ray

    with signals_held():
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield False
    finally:
        ray.shutdown()


def reachable_address() -> str | None:
    """RAY_ADDRESS, or the cluster that `ray start` has left running on this machine; None: start an own one."""
    named = os.environ.get("RAY_ADDRESS")
    if named:
        return None if named == "local" else named
    try:
        address = (Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster").read_text().strip()
        host, _, port = address.rpartition(":")
        socket.create_connection((host, int(port)), timeout=1.0).close()
    except (OSError, ValueError):
        return None  # no such file, or that of a cluster that is gone
    return address


@contextmanager
def own_ray(**options: Any) -> Iterator[None]:
    """A Ray on this machine for as long as the block runs. `options` go to ray.init, such as num_gpus for tests."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    if "RAY_AUTH_MODE" not in os.environ:
        # Whoever can talk to Ray's ports can run code: only this process and its children know the token.
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    import ray  # reads the variables above when it is imported

    # Short, because the paths of Ray's sockets may have 107 characters at most.
    temp_dir = tempfile.mkdtemp(prefix="outcrop-", dir="/tmp")
    others = children(os.getpid())
    try:
        with signals_held():
            ray.init(
                "local",
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=temp_dir,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **options,
            )
        yield
    finally:
        family = descendants(os.getpid(), besides=others)
        ray.shutdown()
        end_processes(family)
        shutil.rmtree(temp_dir, ignore_errors=True)


@contextmanager
def signals_held() -> Iterator[None]:
    """SIGINT and SIGTERM take effect after the block, by the handlers that were there before. For ray.init, which can
    crash when an exception breaks it off, and which puts in handlers of its own.
    """
    held: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.signal(number, lambda number, _: held.append(number)) for number in numbers}
    set_handler = signal.signal
    signal.signal = lambda number, handler: None  # type: ignore[assignment]
    try:
        yield
    finally:
        signal.signal = set_handler
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if held:
            signal.raise_signal(held[0])


def children(pid: int) -> set[int]:
    """Processes that were started by a thread of `pid`."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found |= {int(child) for child in task.read_text().split()}
    return found


def descendants(pid: int, besides: Iterable[int] = ()) -> list[int]:
    """Processes that were started by `pid`, directly or not, but for those in `besides` and their descendants."""
    found: list[int] = []
    todo = [pid]
    while todo:
        new = children(todo.pop()) - set(besides)
        found += new
        todo += new
    return found


def end_processes(pids: list[int]) -> None:
    """Wait for processes that are ending; kill what is left after END_S."""
    deadline = time.monotonic() + END_S
    alive = pids
    while alive and time.monotonic() < deadline:
        alive = [pid for pid in alive if _is_alive(pid)]
        time.sleep(0.05)
    for pid in alive:
        logger.warning("process %d had to be killed", pid)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"
