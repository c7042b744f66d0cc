"""Tells the readiness probe of a pod that an actor of Outcrop serves in it (k8s/bin/outcrop-ready).

A file in the directory of Ray's session, locked for as long as the actor's process lives: the kernel takes the lock
away however it ends, so nobody has to remove the file.
"""

import logging
import os

import ray

from cluster.leftovers import hold

logger = logging.getLogger(__name__)

DIRECTORY = "outcrop-ready"


def show_ready(actor_id: str) -> None:
    """The calling actor serves from now on. Where the file can't be made, only a probe misses it."""
    session: str = ray._private.worker._global_node.get_session_dir_path()  # type: ignore[attr-defined]
    try:
        show_in(os.path.join(session, DIRECTORY), actor_id)
    except OSError as error:
        logger.warning("no readiness probe will know that %s serves: %s", actor_id, error)


def show_in(directory: str, actor_id: str) -> int:
    """Returns the file descriptor that holds the lock."""
    os.makedirs(directory, mode=0o700, exist_ok=True)
    return hold(os.path.join(directory, f"{actor_id}-{os.getpid()}"))  # applications may share a session
