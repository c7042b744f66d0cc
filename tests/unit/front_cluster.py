"""An ingress's client and fake fronts, without Ray."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from cluster.messages.requests import RequestOutput
from cluster.metrics import Metrics
from deploy.ingress.fronts import client as front_client
from deploy.ingress.fronts import link as front_link
from deploy.ingress.fronts.client import FrontClient
from deploy.ingress.fronts.output_stream import OutputStream
from tests.unit.fake_front import FakeFront, fronts_state


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_client, "FRONT_WAIT_S", 0.3)
    monkeypatch.setattr(front_client, "PAUSE_S", (0.01, 0.02))
    monkeypatch.setattr(front_link, "RETRY_S", 0.01)
    monkeypatch.setattr(front_link, "FULL_S", 0.0)


class Cluster:
    """An ingress's client, and the fronts that it finds by name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, max_held: int = 100) -> None:
        self.fronts: dict[str, FakeFront] = {}
        self.metrics = Metrics()
        self.client = FrontClient("ingress", self.metrics, max_held)
        monkeypatch.setattr(front_client.ray, "get_actor", lambda name, namespace: self.fronts[name])

    async def has(self, **fronts: FakeFront) -> None:
        """From now on these are its fronts."""
        self.fronts = fronts
        self.client.update(fronts_state(**fronts))
        await until(lambda: {name for name, link in self.client._links.items() if link.is_open} == set(fronts))

    async def lose(self, name: str) -> None:
        """The actor dies: whatever is asked of it fails. Returns when the client has noticed."""
        self.fronts.pop(name).die()
        await until(lambda: name not in self.client._links)

    @property
    def num_replays(self) -> float:
        return sum(value for name, _, value in self.metrics.samples() if name == "outcrop_front_replays_total")


@asynccontextmanager
async def cluster(
    monkeypatch: pytest.MonkeyPatch, *, max_held: int = 100, **fronts: FakeFront
) -> AsyncIterator[Cluster]:
    found = Cluster(monkeypatch, max_held)
    await found.has(**fronts)
    try:
        yield found
    finally:
        await found.client.close()


async def until(is_true: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not is_true():
            await asyncio.sleep(0.005)


async def read(stream: OutputStream) -> list[int]:
    """All tokens of a stream, once it has ended."""
    async with asyncio.timeout(5):
        return [token async for output in stream for token in output.token_ids]


async def read_error(stream: OutputStream) -> str:
    async with asyncio.timeout(5):
        last: RequestOutput = [output async for output in stream][-1]
    assert last.error is not None
    return last.error
