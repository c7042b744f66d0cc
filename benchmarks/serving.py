"""Streams over HTTP against the same work in an engine without HTTP.

    python -m benchmarks.serving CHECKPOINT [--streams 1,8,32]

Starts `outcrop serve` and an offline engine with replicas of its own, both over the unix lane, and gives each in turn
the same requests. Prints throughput, time to first token, inter-token latency, and throughput as a ratio to the
offline engine's.
"""

import asyncio
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

os.environ["OMP_WAIT_POLICY"] = "passive"

import httpx
import typer

from benchmarks.lanes import expert_cluster, make_engine
from benchmarks.report import save, table
from cluster.models.checkpoint import Checkpoint
from deploy.cli.load_test import Results, percentile, stream_all

START_S = 300
NAME = "bench"  # under which the model is served


@dataclass(frozen=True, slots=True)
class Figure:
    streams: int
    tokens_per_second: float
    of_offline: float
    ttft_p50_ms: float
    ttft_p95_ms: float
    itl_p50_ms: float
    itl_p95_ms: float


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def serving(checkpoint: Path, groups: int, dtype: str) -> Iterator[str]:
    """`outcrop serve` as a process of its own; yields its address."""
    port = free_port()
    command = [sys.executable, "-m", "deploy.cli.main", "serve", str(checkpoint), "--port", str(port), "--dtype", dtype]
    command += ["--groups", str(groups), "--served-model-name", NAME, "--no-enable-prefix-caching"]
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "OUTCROP_"))} | {"RAY_ADDRESS": "local"}
    server = subprocess.Popen(command, env=environ)
    try:
        wait_until_ready(f"http://127.0.0.1:{port}", lambda: server.poll() is None)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(60)


def wait_until_ready(url: str, is_alive: Callable[[], bool] = lambda: True) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and is_alive():
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health", trust_env=False).status_code == 200:
                return
        time.sleep(0.5)
    raise SystemExit(f"{url} did not become ready")


def prompt_of(number: int, length: int) -> list[int]:
    return [(7 * number + 13 * j) % 4000 + 300 for j in range(length)]


def offline_all(engine: Any, streams: int, prompt: int, tokens: int) -> float:
    """Seconds for the same requests in an engine in this process."""
    from cluster.messages.requests import GenerationRequest, SamplingParams

    params = SamplingParams(max_tokens=tokens, temperature=0.0)
    started = time.perf_counter()
    for i in range(streams):
        engine.add(GenerationRequest(str(i), "", tuple(prompt_of(i, prompt)), params))
    while engine.has_work:
        engine.step()
    return time.perf_counter() - started


def measure(url: str, engine: Any, streams: int, prompt: int, tokens: int, rounds: int) -> Figure:
    offline_all(engine, min(streams, 2), prompt, 4)
    prompts = [prompt_of(i, prompt) for i in range(streams)]
    asyncio.run(stream_all(url, prompts[:2], 4))
    http: list[Results] = []
    ratios = []
    for _ in range(rounds):
        offline = offline_all(engine, streams, prompt, tokens)
        http.append(asyncio.run(stream_all(url, prompts, tokens)))
        assert http[-1].num_tokens == streams * tokens, "a stream was cut short"
        ratios.append(offline / http[-1].seconds)
    first = [1000 * seconds for results in http for seconds in results.first]
    between = [1000 * seconds for results in http for seconds in results.between]
    return Figure(
        streams,
        statistics.median(r.num_tokens / r.seconds for r in http),
        statistics.median(ratios),
        percentile(first, 0.5),
        percentile(first, 0.95),
        percentile(between, 0.5),
        percentile(between, 0.95),
    )


def main(
    checkpoint: Path,
    streams: str = "1,8,32",
    prompt: int = 64,
    tokens: int = 48,
    groups: int = 2,
    rounds: int = 3,
    dtype: str = "bfloat16",
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Measure CHECKPOINT over HTTP."""
    with serving(checkpoint, groups, dtype) as url, expert_cluster(checkpoint, groups, 1, dtype) as cluster:
        from actors.process.limits import limit_threads

        limit_threads(os.cpu_count() or 1)
        from actors.compute import Compute

        engine = make_engine(Checkpoint.open(checkpoint), Compute.choose("cpu", dtype), 16 * 1024, 512)
        engine.dispatcher = cluster.dispatcher("unix", engine.metrics)
        figures = [measure(url, engine, n, prompt, tokens, rounds) for n in map(int, streams.split(","))]
        engine.dispatcher.lane.close()
    table(
        ("streams", "tok/s", "of offline", "TTFT p50 / p95 ms", "inter-token p50 / p95 ms"),
        [
            (
                str(f.streams),
                f"{f.tokens_per_second:.1f}",
                f"{f.of_offline:.2f}",
                f"{f.ttft_p50_ms:.0f} / {f.ttft_p95_ms:.0f}",
                f"{f.itl_p50_ms:.1f} / {f.itl_p95_ms:.1f}",
            )
            for f in figures
        ],
    )
    if out:
        settings = {"prompt": prompt, "tokens": tokens, "groups": groups, "dtype": dtype}
        save(out, figures, settings=settings)


if __name__ == "__main__":
    typer.run(main)
