"""Ends an actor whose application is gone.

Fronts and expert replicas are detached, so that they outlive a supervisor that crashes. They would outlive as well an
application that is deleted while its supervisor is dead, and hold their GPUs for ever.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable

from ray.util import list_named_actors

from cluster.messages.actors import NAMESPACE_PREFIX

logger = logging.getLogger(__name__)

# Longer than a head node needs to come back, with Serve's replicas.
SILENCE_S = 300.0
PERIOD_S = 30.0
Clock = Callable[[], float]


class OrphanWatch:
    """Once no supervisor has been heard for SILENCE_S, and Serve has not one replica of the application either, `end`
    is called.
    """

    def __init__(self, is_orphaned: Callable[[], bool], end: Callable[[], None], clock: Clock = time.monotonic) -> None:
        self._is_orphaned = is_orphaned
        self._end = end
        self._clock = clock
        self._heard = clock()

    def hear(self) -> None:
        self._heard = self._clock()

    def check(self) -> None:
        if self._clock() - self._heard > SILENCE_S and self._is_orphaned():
            self._end()

    def run(self) -> None:
        while True:
            time.sleep(PERIOD_S)
            with contextlib.suppress(Exception):  # Ray can't say: ask again
                self.check()


def watch_for_orphanhood(namespace: str, tidy_up: Callable[[], None] = lambda: None) -> OrphanWatch:
    """For the calling actor. It ends itself only in the namespace of an application of Serve."""

    def end() -> None:
        logger.warning("the application of namespace %s is gone: this actor ends", namespace)
        try:
            tidy_up()
        finally:
            os._exit(0)

    watch = OrphanWatch(lambda: not is_deployed(namespace), end)
    if namespace.startswith(NAMESPACE_PREFIX):
        threading.Thread(target=watch.run, name="orphan", daemon=True).start()
    return watch


def is_deployed(namespace: str) -> bool:
    """Whether Serve has a replica, starting or alive, of the application that a namespace belongs to."""
    replicas = f"SERVE_REPLICA::{namespace.removeprefix(NAMESPACE_PREFIX)}#"
    return any(actor["name"].startswith(replicas) for actor in list_named_actors(all_namespaces=True))
