"""Several applications in a Ray that somebody else has started: none takes the place of another, or ends it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from signal import SIGINT

import httpx
import pytest

from tests.e2e.nodes import ENV, is_listening, ray_nodes
from tests.e2e.servers import START_S, STOP_S, Server, eventually

GENERATE = {"prompt": "Hi", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
Start = Callable[..., Server]


@pytest.fixture
def start(model_dir: Path) -> Iterator[Start]:
    """Starts servers in one Ray."""
    with ray_nodes(0) as (address, _, _), ExitStack() as stack:

        def run(*flags: str) -> Server:
            started = Server(model_dir, "--dtype", "float32", *flags, env=ENV | {"RAY_ADDRESS": address})
            stack.callback(started.kill)
            return started

        yield run


def end(server: Server) -> None:
    server.signal(SIGINT)
    assert server.process.wait(STOP_S) == 0, server.log


def model_at(url: str) -> str:
    answer = httpx.post(f"{url}/v1/completions", json=GENERATE, timeout=30, trust_env=False)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["model"])


def test_several_models_in_one_ray(start: Start) -> None:
    first = start().wait_ready()
    port = str(first.port)
    elsewhere, same = start(), start("--port", port)
    assert elsewhere.process.wait(START_S) == same.process.wait(START_S) == 1
    assert f"Serve of this Ray listens on 127.0.0.1:{port}" in " ".join(elsewhere.log.split())
    assert f"--host 127.0.0.1 --port {port} and another --name" in " ".join(elsewhere.log.split())
    assert f"serves the application 'outcrop' at {first.url} already: choose another --name" in same.log

    second = start("--port", port, "--name", "second", "--served-model-name", "two", "--lane", "local")
    eventually(lambda: "ready" in second.log or second.process.poll() is not None, "the second is ready", START_S)
    url = f"{first.url}/second"
    assert f"two on {url}" in second.log
    assert (model_at(url), model_at(first.url)) == ("two", "tiny")
    assert "<title>" in httpx.get(url, follow_redirects=True, trust_env=False).text

    end(second)
    assert model_at(first.url) == "tiny"
    assert first.get("/second/health").status_code == 404
    end(first)
    assert first.get("/health").status_code == 404, "Serve goes on: who has started Ray ends it"
    assert is_listening(first.port)
