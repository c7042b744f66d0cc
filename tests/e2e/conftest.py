"""Servers that files share: one that nobody changes, one for operators, one that is watched and short of memory. See
servers.py for what is checked when they stop.
"""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.checkpoints import MODELS, TinyModel, write_checkpoint
from tests.e2e.collector import Collector, collecting
from tests.e2e.oracle import Oracle
from tests.e2e.servers import Server, ray_token, serving


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
def server(model_dir: Path, unwanted_traces: Collector) -> Iterator[Server]:
    """Its experts stay where they are at the start, and its actors the first ones."""
    env = {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": unwanted_traces.url, "OTEL_BSP_SCHEDULE_DELAY": "100"}
    env |= ray_token()
    with serving(model_dir, "--groups", "2", "--replicas", "1", "--dtype", "float32", env=env) as running:
        yield running


@pytest.fixture(scope="session")
def operated() -> Iterator[Server]:
    """To be scaled, rebalanced and broken. Each test leaves it with one front and one replica of each group."""
    with serving("demo", "--groups", "2") as running:
        yield running


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
    with serving(model_dir, *flags, env={"OTEL_BSP_SCHEDULE_DELAY": "100"}) as running:
        yield running


@pytest.fixture(scope="session")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
        yield client


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[OpenAI]:
    """No retries: an error that goes away when asked again is an error."""
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as openai:
        yield openai


@pytest.fixture
async def async_client(server: Server) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as openai:
        yield openai
