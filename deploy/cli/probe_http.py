"""What HTTP costs: CPU of ingress and proxy for each streamed token, and a request's time before its first."""

import asyncio
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from cluster.errors import ConfigError
from cluster.planning.hardware import HttpSpeed
from deploy.cli.load_test import Results, stream_all
from deploy.cli.local_ray import descendants

STREAMS, PROMPT, TOKENS = 16, 16, 128
START_S = 180.0
# Names that Serve gives to the processes that a token goes through behind its front.
PROCESSES = ("ray::ServeReplica:outcrop:ingress", "ray::ProxyActor")
TICKS = os.sysconf("SC_CLK_TCK")


def measure_http() -> HttpSpeed:
    """Of a server of the demo model, which computes next to nothing. Raises ConfigError if none comes up."""
    prompts = [[(7 * number + 13 * place) % 1000 + 2 for place in range(PROMPT)] for number in range(STREAMS)]
    with _serving() as (url, pid):
        asyncio.run(stream_all(url, prompts, 8))
        alone: list[Results] = [asyncio.run(stream_all(url, prompts[:1], 8)) for _ in range(8)]
        before = _cpu_seconds(pid)
        many = asyncio.run(stream_all(url, prompts, TOKENS))
        spent = _cpu_seconds(pid) - before
    if many.errors:
        raise ConfigError(f"the server of the probe refused a request: {many.errors[0]}")
    waits = [results.first[0] - statistics.median(results.between) for results in alone]
    return HttpSpeed(token_us=max(1.0, 1e6 * spent / many.num_tokens), request_ms=max(0.0, 1e3 * min(waits)))


@contextlib.contextmanager
def _serving() -> Iterator[tuple[str, int]]:
    """`outcrop serve demo` on a port of its own; yields its address and its process id."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "deploy.cli.main", "serve", "demo", "--port", str(port), "--groups", "1"]
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "OUTCROP_"))} | {"RAY_ADDRESS": "local"}
    server = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        _wait(f"http://127.0.0.1:{port}", server)
        yield f"http://127.0.0.1:{port}", server.pid
    finally:
        server.terminate()
        server.communicate()


def _wait(url: str, server: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health", trust_env=False).status_code == 200:
                return
        time.sleep(0.2)
    raise ConfigError(f"the server of the probe did not become ready at {url}: try `outcrop serve demo`")


def _cpu_seconds(pid: int) -> float:
    """That ingress and proxy of this server have used since they started."""
    ticks = 0
    for child in descendants(pid):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{child}/cmdline").read_text().startswith(PROCESSES):
                # utime and stime, after the name in parentheses: proc(5)
                ticks += sum(map(int, Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[11:13]))
    return ticks / TICKS
