"""Signals at the wrong moment. Each time: an end within seconds, exit code 0, and nothing left of what was started."""

import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.servers import STOP_S, Server, eventually

COMPLETIONS = "/v1/completions"
LONG: dict[str, Any] = {"prompt": "Hi", "max_tokens": 2000, "ignore_eos": True, "stream": True}


@pytest.fixture
def server(model_dir: Path) -> Iterator[Server]:
    """Just started: not ready yet."""
    started = Server(model_dir, "--groups", "2", "--dtype", "float32")
    yield started
    started.kill()


@pytest.mark.parametrize("num_processes", [1, 3])
def test_sigterm_while_ray_starts(server: Server, num_processes: int) -> None:
    started = lambda: bool(server.temp_dirs()) and len(server.processes()) >= num_processes  # noqa: E731
    eventually(started, f"Ray has a directory and {num_processes} processes run", 60)
    server.stop(signal.SIGTERM)
    assert "ready" not in server.log


def test_what_a_killed_server_leaves_is_removed_by_the_next(server: Server, model_dir: Path) -> None:
    eventually(lambda: bool(server.temp_dirs()) and len(server.processes()) >= 3, "Ray runs", 60)
    assert [oct(d.stat().st_mode & 0o777) for d in server.temp_dirs()] == ["0o700"]
    server.process.kill()
    eventually(lambda: not server.processes(), "Ray ends with the process that started it", 30)
    following = Server(model_dir)
    try:
        eventually(lambda: not server.temp_dirs(), "the directory of the killed server is removed", 60)
        following.stop()
    finally:
        following.kill()


def test_sigterm_while_the_application_starts(server: Server) -> None:
    eventually(lambda: any("ServeController" in " ".join(p.cmdline()) for p in server.processes()), "Serve starts", 60)
    server.stop(signal.SIGTERM)
    assert "ready" not in server.log


def test_sigint_while_loading(server: Server) -> None:
    """HTTP answers before the model is there, and says so."""
    eventually(lambda: server.is_answering(503), "GET /health answers 503", 60)
    state = server.get("/health").json()
    assert state["state"] == "starting"
    assert state.keys() >= {"phase", "loaded_bytes", "total_bytes"}
    refused = httpx.post(server.url + COMPLETIONS, json={"prompt": "Hi"}, timeout=30)
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "unavailable"
    assert "retry-after" in refused.headers
    server.stop(signal.SIGINT)


def test_ctrl_c_with_a_stream_in_flight_and_an_impatient_user(server: Server) -> None:
    """Ctrl-C reaches the whole process group; pressing it again must not break off the orderly end."""
    server.wait_ready()
    ended = threading.Event()

    def read() -> None:
        try:
            with httpx.stream("POST", server.url + COMPLETIONS, json=LONG, timeout=STOP_S) as response:
                for line in response.iter_lines():
                    lines.append(line)
        except httpx.TransportError:
            pass
        ended.set()

    lines: list[str] = []
    threading.Thread(target=read, daemon=True).start()
    eventually(lambda: len(lines) > 4, "the stream runs")
    for _ in range(4):
        server.signal(signal.SIGINT)
        time.sleep(0.3)
    assert server.wait_gone() == 0
    assert ended.wait(5), "the client still waits for a server that is gone"
    assert "stopped" in server.log
    assert "Traceback" not in server.log


def test_sigterm_while_the_model_is_downloaded() -> None:
    """Here it takes forever: the Hub takes the connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as hub:
        endpoint = f"http://127.0.0.1:{hub.getsockname()[1]}"
        server = Server("owner/name", env={"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"})
        try:
            hub.settimeout(60)
            with hub.accept()[0] as asked:
                assert asked.recv(1024).startswith(b"GET /api/")
                server.stop(signal.SIGTERM)
            assert "stopped" in server.log
        finally:
            server.kill()
