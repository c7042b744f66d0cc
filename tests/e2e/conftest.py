"""Servers that files share: one that nobody changes, one for operators, one that is watched and short of memory. See
servers.py for what is checked when they stop.

One of them runs at a time: one that waits takes a tenth of a processor all the same. So the files that share a server
come one after the other, and it ends with the last of their tests.
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.checkpoints import MODELS, TinyModel, write_checkpoint
from tests.e2e.collector import Collector, collecting
from tests.e2e.oracle import Oracle
from tests.e2e.servers import Server, ray_token, serving

SHARED = ("untouched", "operated", "watched")
shared_by: dict[Path, int] = {}  # file -> number of the server that its tests share; -1: none
running = ExitStack()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ours = [place for place, item in enumerate(items) if Path(__file__).parent in item.path.parents]
    for item in (items[place] for place in ours):
        names = getattr(item, "fixturenames", ())
        number = next((number for number, name in enumerate(SHARED) if name in names), -1)
        shared_by[item.path] = max(number, shared_by.get(item.path, -1))
    ordered = sorted((items[place] for place in ours), key=lambda item: shared_by[item.path])
    for place, item in zip(ours, ordered, strict=True):
        items[place] = item


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if nextitem is None or shared_by.get(nextitem.path) != shared_by[item.path]:
        running.close()


def shared(model: str | Path, *flags: str, env: dict[str, str] | None = None) -> Iterator[Server]:
    yield running.enter_context(serving(model, *flags, env=env))
    running.close()  # if the last of its tests is never reached


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MODELS["granite"], weight by weight, but a request can run for as long as a test needs, and logits spread as
    those of a trained model do: else sampling rules have little to choose from.
    """
    changes = {"max_position_embeddings": 2048, "logits_scaling": 0.06}
    model = TinyModel(MODELS["granite"].config | changes)
    return write_checkpoint(model, tmp_path_factory.mktemp("granite"))


@pytest.fixture(scope="session")
def oracle(model_dir: Path) -> Oracle:
    return Oracle(model_dir)


@pytest.fixture(scope="session")
def unwanted_traces() -> Iterator[Collector]:
    """A collector that the environment of the server below names, and that no flag does."""
    with collecting() as running:
        yield running


@pytest.fixture(scope="session")
def untouched(model_dir: Path, unwanted_traces: Collector) -> Iterator[Server]:
    """Its experts stay where they are at the start, and its actors the first ones."""
    env = {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": unwanted_traces.url, "OTEL_BSP_SCHEDULE_DELAY": "100"}
    env |= ray_token()
    yield from shared(model_dir, "--groups", "2", "--replicas", "1", "--dtype", "float32", env=env)


@pytest.fixture(scope="module")
def server(untouched: Server) -> Server:
    return untouched


@pytest.fixture(scope="session")
def operated() -> Iterator[Server]:
    """To be scaled, rebalanced and broken. Each test leaves it with one front and one replica of each group."""
    yield from shared("demo", "--groups", "2")


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    with collecting() as running:
        yield running


@pytest.fixture(scope="session")
def watched(model_dir: Path, collector: Collector) -> Iterator[Server]:
    """Tells all that it does. Three prompts of 1,500 tokens fit into its KV cache, 24 answers of 300 tokens don't."""
    flags = ["--groups", "2", "--replicas", "2", "--dtype", "float32", "--otlp-traces-endpoint", collector.url]
    flags += ["--log-format", "json", "--log-level", "debug"]
    flags += ["--max-num-batched-tokens", "64", "--kv-cache-gib", "0.0037"]
    yield from shared(model_dir, *flags, env={"OTEL_BSP_SCHEDULE_DELAY": "100"})


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
        yield client


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    """No retries: an error that goes away when asked again is an error."""
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as openai:
        yield openai


@pytest.fixture
async def async_client(server: Server) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as openai:
        yield openai
