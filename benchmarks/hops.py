"""What each hop of a token costs, from the engine to the client: the same streams, read behind one hop more each time.

    python -m benchmarks.hops [MODEL] [--streams 1,32,128]

Serves MODEL (the demo by default, whose experts cost next to nothing) and reads streams from a front by Ray calls,
through the ingress without Serve, and through Serve. With RAY_SERVE_ENABLE_HA_PROXY=1 in the environment, Serve's
proxy is HAProxy. Prints milliseconds a token of one stream, and tokens per second of many.
"""

import asyncio
import contextlib
import multiprocessing
import os
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

os.environ["OMP_WAIT_POLICY"] = "passive"

import httpx
import typer

from benchmarks.report import save, table
from benchmarks.serving import prompt_of, wait_until_ready
from cluster.config import ClusterConfig, load_config
from cluster.messages.requests import SamplingParams
from cluster.metrics import Metrics
from deploy.cli.load_test import Results, stream_all
from deploy.cli.local_ray import own_ray
from deploy.demo import expand_demo

PROMPT = 16
HAS_HAPROXY = os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"

Read = Callable[[list[list[int]]], Results]


@dataclass(frozen=True, slots=True)
class Figure:
    """`ms_a_token`: median of the times between tokens. Of the engine: its mean step, while a hop behind it is read."""

    hop: str
    streams: int
    ms_a_token: float
    tokens_per_second: float


@contextlib.contextmanager
def served(config: ClusterConfig) -> Iterator[Any]:
    """The application on a Ray of its own; yields a handle of its supervisor."""
    with own_ray():
        from ray import serve  # reads its variables when it is imported

        from deploy.app import application

        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": config.host, "port": config.port},
            logging_config={"log_level": "WARNING", "enable_access_log": False},
        )
        serve.run(application(config, is_gated=False), name=config.name, route_prefix="/")
        wait_until_ready(_url(config.port))
        yield serve.get_deployment_handle("supervisor", config.name)


async def _from_front(supervisor: Any, prompts: list[list[int]], tokens: int) -> Results:
    """Through the engine, the front's mailboxes and Ray, as an ingress reads them."""
    from deploy.ingress.fronts.client import FrontClient

    client, results = FrontClient("hops", Metrics(), len(prompts)), Results()
    client.update(await supervisor.state.remote())
    while not client.is_available:
        await asyncio.sleep(0.01)

    async def one(prompt: list[int]) -> None:
        stream = await client.submit("", tuple(prompt), SamplingParams(max_tokens=tokens, temperature=0.0))
        last = time.perf_counter()
        async for output in stream:
            now = time.perf_counter()
            results.num_tokens += len(output.token_ids)
            results.between.append(now - last)
            last = now
        stream.close()

    started = time.perf_counter()
    await asyncio.gather(*map(one, prompts))
    results.seconds = time.perf_counter() - started
    await client.close()
    return results


@contextlib.contextmanager
def _ingress(config: ClusterConfig, supervisor: Any) -> Iterator[str]:
    """The ingress's own HTTP server in a thread of this process; yields its address."""
    import uvicorn

    from deploy.app import _Link
    from deploy.ingress.api import create_api
    from deploy.ingress.service import Service

    port = _free_port()
    server: list[uvicorn.Server] = []

    async def run() -> None:
        service = Service(config, Path(config.model), _Link(supervisor))
        server.append(uvicorn.Server(uvicorn.Config(create_api(service), port=port, log_level="warning")))
        await server[0].serve()
        await service.close()

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    try:
        wait_until_ready(_url(port))
        yield _url(port)
    finally:
        server[0].should_exit = True
        thread.join()


def _from_http(url: str, prompts: list[list[int]], tokens: int) -> Results:
    return asyncio.run(stream_all(url, prompts, tokens))


def _step_seconds(url: str) -> tuple[float, float]:
    """(sum, count) of all steps so far."""
    lines = httpx.get(f"{url}/metrics", trust_env=False).text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if line.startswith("outcrop_step_seconds_"))
    return tuple(float(values[f"outcrop_step_seconds_{name}"]) for name in ("sum", "count"))  # type: ignore[return-value]


def measure(hops: dict[str, Read], url: str, streams: int, rounds: int) -> list[Figure]:
    """Hop after hop in each round, medians over rounds."""
    found: dict[str, list[tuple[float, float]]] = {"engine": []} | {hop: [] for hop in hops}
    prompts = [prompt_of(i, PROMPT) for i in range(streams)]
    for _ in range(rounds):
        for number, (hop, read) in enumerate(hops.items()):
            before = _step_seconds(url)
            results = read(prompts)
            assert not results.errors, results.errors[0]
            found[hop].append((1e3 * statistics.median(results.between), results.num_tokens / results.seconds))
            if number == 0:
                after = _step_seconds(url)
                step = (after[0] - before[0]) / (after[1] - before[1])
                found["engine"].append((1e3 * step, streams / step))
    return [
        Figure(hop, streams, *(statistics.median(column) for column in zip(*rows, strict=True)))
        for hop, rows in found.items()
    ]


def main(
    model: str = "demo",
    streams: str = "1,32,128",
    tokens: int = 100,
    rounds: int = 3,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Measure each hop on MODEL."""
    numbers = [int(number) for number in streams.split(",")]
    settings = {"model": model, "port": _free_port(), "max_num_seqs": max(64, *numbers), "max_num_waiting": 1024}
    config = expand_demo(load_config(settings | {"enable_prefix_caching": False}))
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as client:
        client.submit(_free_port).result()  # so that it is there before our Ray, which ends what was started later

        def http(url: str) -> Read:
            return lambda prompts: client.submit(_from_http, url, prompts, tokens).result()

        with served(config) as supervisor, _ingress(config, supervisor) as direct:
            url = _url(config.port)
            hops: dict[str, Read] = {
                "mailbox, Ray": lambda prompts: asyncio.run(_from_front(supervisor, prompts, tokens)),
                "ingress, SSE": http(direct),
                "HAProxy" if HAS_HAPROXY else "Serve's proxy": http(url),
            }
            figures = [figure for number in numbers for figure in measure(hops, url, number, rounds)]
    rows = [(f.hop, str(f.streams), f"{f.ms_a_token:.1f}", f"{f.tokens_per_second:.0f}") for f in figures]
    table(("up to", "streams", "ms a token", "tokens/s"), rows)
    if out:
        save(out, figures, settings={"model": model, "tokens": tokens, "rounds": rounds})


def _url(port: int) -> str:
    return f"http://127.0.0.1:{port}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    typer.run(main)
