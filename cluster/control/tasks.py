"""What the supervisor has going on in the background."""

import asyncio
import contextvars
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Tasks:
    """They run in the context in which this was made: with a request, Ray cancels the calls made on its behalf."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._context = contextvars.copy_context()

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work, context=self._context.copy())
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            logger.error("%s ended with an unexpected error", task.get_name(), exc_info=error)

    def cancel_others(self) -> None:
        """All but the one that asks for it."""
        for task in tuple(self._tasks):
            if task is not asyncio.current_task():
                task.cancel()
