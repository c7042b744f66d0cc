"""An event loop on a time of its own: it passes only when there is nothing to do, and then at once.

So a test may wait for what takes minutes, and what is due at a time happens in that order, on however slow a machine.
"""

import asyncio
import selectors
from typing import Any

THREADS_PERIOD_S, PATIENCE_S = 0.01, 10.0


class VirtualLoop(asyncio.SelectorEventLoop):
    """Its time stands still while threads work for it."""

    def __init__(self) -> None:
        self._now = 0.0
        self._num_in_threads = 0
        super().__init__(_Selector(self))

    def time(self) -> float:
        return self._now

    @property
    def patience(self) -> float | None:
        return None if self._num_in_threads else PATIENCE_S

    def pass_time(self, seconds: float) -> float:
        """Returns how long to wait for threads."""
        if self._num_in_threads:
            return THREADS_PERIOD_S
        self._now += seconds
        return 0.0

    def run_in_executor(self, *given: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        self._num_in_threads += 1
        future: asyncio.Future[Any] = super().run_in_executor(*given)  # type: ignore[assignment]
        future.add_done_callback(self._leave_thread)
        return future

    def _leave_thread(self, _: asyncio.Future[Any]) -> None:
        self._num_in_threads -= 1


class _Selector(selectors.DefaultSelector):  # type: ignore[valid-type,misc]
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        """Raises RuntimeError where a test would wait for ever: nothing is due, and no thread wakes the loop."""
        if timeout is None:
            if events := super().select(self._loop.patience):
                return events
            raise RuntimeError("a deadlock: all tasks wait, and for nothing that has a time")
        return super().select(0) or super().select(self._loop.pass_time(timeout) if timeout > 0 else 0)
