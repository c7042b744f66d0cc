"""The HTTP side around a cluster that is not there."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest

from cluster.config import ClusterConfig
from cluster.messages.state import ClusterState
from cluster.models.hub import resolve_model
from deploy.demo import expand_demo
from deploy.ingress.api import create_api
from deploy.ingress.service import Service

COMPLETIONS = "/v1/completions"
JSON = {"Content-Type": "application/json"}


class Link:
    """A supervisor that knows no front, and fails when it is asked for metrics."""

    async def push_samples(self, ingress_id: str, samples: tuple[Any, ...]) -> ClusterState:
        return ClusterState("starting", "loading", "")

    async def exposition(self, ingress_id: str, samples: tuple[Any, ...]) -> bytes:
        raise RuntimeError("broken")


Open = Callable[..., Awaitable[httpx.AsyncClient]]


@pytest.fixture
async def open_api() -> AsyncIterator[Open]:
    services: list[Service] = []

    async def start(**settings: Any) -> httpx.AsyncClient:
        config = expand_demo(ClusterConfig(model="demo", **settings))
        services.append(Service(config, resolve_model(config.model), Link()))  # type: ignore[arg-type]
        app = create_api(services[-1])
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        client = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000")
        client.service = services[-1]  # type: ignore[attr-defined]
        return client

    yield start
    for service in services:
        await service.close()
