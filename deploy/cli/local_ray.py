"""The Ray cluster that `outcrop serve` runs on: the one that is reachable, or one of its own for as long as it runs."""

import logging
import os
import secrets
import signal
import socket
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cluster.leftovers import OwnedDirectory, sweep

logger = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 128 * 2**20
END_S = 15.0
PREFIX = "outcrop-"

# Environment of a Ray that we start. Variables that are set already win.
SETTINGS = {
    "RAY_max_direct_call_object_size": str(4 * 2**20),  # token batches travel inside the RPC
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
}


@contextmanager
def ray_cluster(address: str | None) -> Iterator[None]:
    """Connect to a Ray, or start one for as long as the block runs, which leaves no process and no file behind."""
    if address is None:
        with own_ray():
            yield
        return
    import ray

    with signals_held():
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def reachable_address() -> str | None:
    """RAY_ADDRESS, or the cluster that `ray start` has left running on this machine; None: start an own one.

    Whoever runs a Ray that we connect to gets our API key and may run code as us. Ray notes its address in a directory
    that every user may write to: another user's note, or another user's process at the address in it, is not used.
    """
    named = os.environ.get("RAY_ADDRESS")
    if named:
        return None if named == "local" else named
    note = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    try:
        address = _read_note(note)
        host, _, port = address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=1.0) as connection:
            is_local = connection.getsockname()[0] == connection.getpeername()[0]
        if is_local and (strangers := _listening_users(int(port)) - _trusted_users()):
            raise _UntrustedError(f"user {min(strangers)} listens at the address in it, {address}")
    except _UntrustedError as why:
        logger.warning("%s is not used: %s; RAY_ADDRESS=HOST:PORT names the Ray to use, if one should be", note, why)
        return None
    except (OSError, ValueError):
        return None  # no such file, or that of a cluster that is gone
    return address


class _UntrustedError(Exception):
    """Another user may be behind what looks like our Ray; says how."""


def _trusted_users() -> set[int]:
    return {0, os.geteuid()}


def _read_note(path: Path) -> str:
    """Raises _UntrustedError, or OSError if there is none."""
    if path.is_symlink():
        raise _UntrustedError("it is a link")
    # Whatever it has become meanwhile: no link is followed, no pipe waited for.
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)) as note:
        status = os.fstat(note.fileno())
        if status.st_uid not in _trusted_users():
            raise _UntrustedError(f"it belongs to user {status.st_uid}")
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise _UntrustedError("other users may write to it")
        return note.read().strip()


def _listening_users(port: int) -> set[int]:
    """Users whose processes listen on a port of this machine, at any of its addresses."""
    tables = [table.read_text().splitlines()[1:] for table in Path("/proc/net").glob("tcp*")]
    sockets = [line.split() for lines in tables for line in lines]  # fields: proc(5)
    return {int(found[7]) for found in sockets if found[3] == "0A" and found[1].endswith(f":{port:04X}")}


@contextmanager
def own_ray(**options: Any) -> Iterator[None]:
    """A Ray on this machine for as long as the block runs. `options` go to ray.init, such as num_gpus for tests."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    if "RAY_AUTH_MODE" not in os.environ:
        # Whoever can talk to Ray's ports can run code: only this process and its children know the token.
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    import ray  # reads the variables above when it is imported

    sweep(PREFIX, "/tmp")
    # Short, because the paths of Ray's sockets may have 107 characters at most. Ray's own directory is within, because
    # Ray opens that to all users.
    directory = OwnedDirectory(PREFIX, "/tmp")
    others = children(os.getpid())
    try:
        with signals_held():
            ray.init(
                "local",
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=f"{directory.path}/ray",
                log_to_driver=False,
                logging_level=logging.ERROR,
                **options,
            )
        yield
    finally:
        family = descendants(os.getpid(), besides=others)
        ray.shutdown()
        end_processes(family)
        directory.remove()


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
