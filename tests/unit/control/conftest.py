"""Control without Ray: every test of this folder has actors in its own process, and a time of its own."""

import asyncio
from collections.abc import Callable

from tests.unit.control.fake_actors import actors, checkpoint
from tests.unit.control.virtual_time import VirtualLoop

__all__ = ["actors", "checkpoint"]


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"virtual": VirtualLoop}
