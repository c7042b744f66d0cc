"""A real `outcrop serve` in a process of its own, and what must be true once it has stopped."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from glob import glob
from pathlib import Path
from random import SystemRandom
from signal import SIGTERM, Signals
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

OUTCROP = Path(sys.executable).with_name("outcrop")
MODEL = "tiny"
START_S = 120.0
# Generous: these machines are shared. An orderly stop takes 3 to 5 s.
STOP_S = 45.0

CHECK_INTEGRITY = """
import sys, ray
from ray.util import list_named_actors
ray.init(sys.argv[1], log_to_driver=False)
fronts = [actor for actor in list_named_actors(all_namespaces=True) if actor["name"].startswith("front-")]
assert fronts
ray.get([ray.get_actor(**actor).check_integrity.remote() for actor in fronts], timeout=30)
"""

# Of a request: httpx reads the certificates of the world for each client otherwise, which takes 25 ms.
PLAIN: dict[str, Any] = {"verify": False, "trust_env": False}

# (name, labels) of a sample -> value
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def free_port() -> int:
    """One that nobody listens on, nor gets from the kernel before we use it: those are above 32768 (ip(7)). Ray gives
    its workers those below 20000.
    """
    while True:
        port = SystemRandom().randrange(20_000, 32_768)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Ours without settings of Ray or Outcrop, so that a server always starts a Ray of its own."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "OUTCROP_"))}
    return kept | {"RAY_ADDRESS": "local"} | dict(extra or {})


def ray_token() -> dict[str, str]:
    """Lets us into the Ray of a server that is started with it."""
    return {name: os.environ[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}


def eventually(is_true: Callable[[], bool], what: str, timeout: float = 20.0) -> None:
    """Poll until it is true, the less often the longer it takes: who looks takes time from who is looked at. Fails,
    naming `what`, when the time is up.
    """
    started = time.monotonic()
    while not is_true():
        waited = time.monotonic() - started
        assert waited < timeout, f"not within {timeout:g} s: {what}"
        time.sleep(min(0.02 + waited / 20, 0.25))


class Server:
    """`outcrop serve` in a session of its own, so that each process it starts can be found, adopted or not."""

    def __init__(self, model: str | Path, *flags: str, env: Mapping[str, str] | None = None) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.model_dir = Path(model)
        self._output = tempfile.TemporaryFile(prefix="e2e-")  # noqa: SIM115 - lives as long as the server
        command = [OUTCROP, "serve", str(model), "--port", str(self.port), "--served-model-name", MODEL, *flags]
        self._dirs: set[Path] = set()
        self.process = subprocess.Popen(
            command,
            env=clean_environment(env),
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @property
    def log(self) -> str:
        """What it has printed."""
        end = self._output.seek(0, os.SEEK_END)
        return os.pread(self._output.fileno(), end, 0).decode(errors="replace")

    def processes(self) -> list[psutil.Process]:
        """Every live process of its session: itself and whatever it or its children have started."""
        return session(self.process.pid)

    def temp_dirs(self) -> list[Path]:
        """Its directories in /tmp that are there. Ray puts the pid into the name of a session; before there is one,
        the process has the lock of its directory open. Other servers may have theirs.
        """
        pid = self.process.pid
        self._dirs |= {Path(d).parents[1] for d in glob(f"/tmp/outcrop-*/ray/session_*_{pid}")}
        for fd in glob(f"/proc/{pid}/fd/*"):
            with suppress(OSError):  # it is closed while it is looked at
                if (file := Path(fd).readlink()).match("/tmp/outcrop-*/.owner"):
                    self._dirs.add(file.parent)
        return sorted(d for d in self._dirs if d.exists())

    def ray_logs(self) -> str:
        """The logs of Serve: proxy, controller and replicas."""
        return "\n".join(f.read_text() for d in self.temp_dirs() for f in d.glob("ray/session_*_*/logs/serve/*.log"))

    def actor_logs(self) -> str:
        """What our own processes have logged: fronts, replicas, ingresses and the supervisor."""
        return "\n".join(f.read_text() for d in self.temp_dirs() for f in d.glob("ray/session_*_*/logs/worker-*.err"))

    def get(self, path: str, **options: object) -> httpx.Response:
        return httpx.get(self.url + path, timeout=30, **PLAIN, **options)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = httpx.post(self.url + path, json=body, timeout=60, **PLAIN)
        assert answer.status_code == 200, answer.text
        return answer.json()  # type: ignore[no-any-return]

    def is_answering(self, status: int = 200) -> bool:
        assert self.process.poll() is None, f"exit code {self.process.returncode}:\n{self.log}"
        try:
            return self.get("/health").status_code == status
        except httpx.TransportError:
            return False

    def wait_ready(self) -> "Server":
        eventually(self.is_answering, "GET /health answers 200", START_S)
        return self

    def samples(self) -> Samples:
        text = self.get("/metrics").text
        families = text_string_to_metric_families(text)
        return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}

    def metric(self, name: str, **labels: str) -> float:
        """A sample of /metrics by its name without prefix; 0 where there is none yet."""
        return self.samples().get((f"outcrop_{name}", frozenset(labels.items())), 0.0)

    def wait_idle(self, timeout: float = 20.0) -> None:
        """No sequence runs or waits, and every KV block has been given back."""
        names = [f"outcrop_num_requests_{what}" for what in ("running", "waiting")] + ["outcrop_kv_cache_usage_ratio"]

        def is_idle() -> bool:
            return not any(value for (name, _), value in self.samples().items() if name in names)

        eventually(is_idle, f"all 0: {', '.join(names)}", timeout)

    def unbalance(self) -> None:
        """Load that other places of the experts would spread better: one token again and again, until one is found."""
        for token in range(1, 60):
            body = {"prompt": [token] * 64, "max_tokens": 8, "n": 4}
            self.post("/v1/completions", body)
            if self.post("/v1/cluster/rebalance", {"dry_run": True, "force": True})["experts_moved"]:
                return
        raise AssertionError("there is never anything to move")

    def check_integrity(self) -> None:
        """Every front checks its scheduler and cache between two steps. Needs the environment of ray_token()."""
        words = [word for process in self.processes() for word in process.cmdline()]
        address = next(word for word in words if word.startswith("--gcs-address=")).partition("=")[2]
        done = subprocess.run(
            [sys.executable, "-c", CHECK_INTEGRITY, address],
            env=clean_environment(ray_token()),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr

    def signal(self, number: Signals) -> None:
        """As a terminal does it: to the whole process group."""
        os.killpg(self.process.pid, number)

    def stop(self, number: Signals = SIGTERM) -> None:
        """Signal the process alone, as an init system does, and check that it leaves nothing behind."""
        self.temp_dirs()  # while it can be asked
        self.process.send_signal(number)
        assert self.wait_gone() == 0, f"exit code {self.process.returncode}:\n{self.log}"
        assert "had to be killed" not in self.log, self.log

    def wait_gone(self, timeout: float = STOP_S) -> int:
        """Wait for the end, check that nothing is left, and return the exit code."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout:g} s:\n{self.log}") from None
        assert not self.processes(), f"left behind: {[p.cmdline() for p in self.processes()]}"
        assert self.is_port_free(), f"something still listens on port {self.port}"
        eventually(lambda: not self.temp_dirs(), f"{self.temp_dirs()} removed", 1.0)
        return code

    def is_port_free(self) -> bool:
        with socket.socket() as probe:
            probe.settimeout(1.0)
            return probe.connect_ex(("127.0.0.1", self.port)) != 0

    def kill(self) -> None:
        """The end of a failed test: no process of the session survives."""
        for process in self.processes():
            process.kill()
        self.process.wait(10)
        self._output.close()


@contextmanager
def serving(model: str | Path, *flags: str, env: Mapping[str, str] | None = None) -> Iterator[Server]:
    """A server that is ready; stopped in good order at the end."""
    server = Server(model, *flags, env=env)
    try:
        yield server.wait_ready()
        server.stop()
    finally:
        server.kill()


def session(leader: int) -> list[psutil.Process]:
    """Every live process of a session, adopted by init or not."""
    found = []
    for pid in psutil.pids():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(pid) == leader and (process := psutil.Process(pid)).status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
