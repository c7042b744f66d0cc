"""What can be checked of the image without building it: pins, copied paths, and the scripts that pods run."""

import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import huggingface_hub
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deploy.demo import MODEL_DIR
from tests.e2e.servers import eventually, free_port
from tests.k8s.heads import answers, ray_head
from tests.k8s.manifests import K8S, ROOT, containers, one, overlay, pod_templates, ray_groups

BIN = K8S / "bin"
PIN = r"([\w.-]+)==(\S+)( --hash=sha256:[0-9a-f]{64})?"
DOCKERFILE = (K8S / "Dockerfile").read_text()


def test_every_dependency_is_pinned_within_its_range() -> None:
    pins = {}
    for line in (K8S / "requirements.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, version, has_hash = re.fullmatch(PIN, line).groups()  # type: ignore[union-attr]
            pins[name] = version
            assert bool(has_hash) != (name == "torch"), line
    assert "pip install --no-deps --require-hashes --requirement" in DOCKERFILE
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in (*project["dependencies"], *project["optional-dependencies"]["otel"]):
        wanted = Requirement(text)
        assert wanted.specifier.contains(pins[canonicalize_name(wanted.name)]), text


def test_the_dockerfile_copies_what_the_context_has() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = re.findall(r"^COPY (?!--from)(?:--\S+ )?(.+) \S+$", DOCKERFILE, re.MULTILINE)
    paths = {path.rstrip("/") for line in copied for path in line.split()}
    assert paths == allowed
    assert all((ROOT / path).exists() for path in paths)


def test_the_dockerfile_copies_what_the_package_is_built_from() -> None:
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project, build = content["project"], content["tool"]["hatch"]["build"]
    hooks = {hook.get("path", "hatch_build.py") for name, hook in build["hooks"].items() if name == "custom"}
    needed = {"pyproject.toml", project["readme"], *project["license-files"], *build["targets"]["wheel"]["packages"]}
    assert needed | hooks <= set(re.findall(r"[\w./]+", " ".join(re.findall(r"^COPY (?!--)(.+)", DOCKERFILE, re.M))))


def test_the_image_runs_as_the_user_that_pods_ask_for() -> None:
    assert "useradd --uid 1000 --create-home ray" in DOCKERFILE
    assert DOCKERFILE.index("USER 1000:1000") > DOCKERFILE.rindex("RUN ")
    assert re.findall(r"^ARG PYTHON=python:\d+\.\d+\.\d+-slim-\w+$", DOCKERFILE, re.MULTILINE)


def test_pods_run_scripts_that_the_image_has() -> None:
    commands = set()
    for name in ("gpu-single-node", "production"):
        for found in overlay(name):
            for _, template in pod_templates(found):
                for container in containers(template):
                    probe = container.get("readinessProbe", {}).get("exec", {}).get("command", [""])
                    hook = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [""])
                    commands |= {probe[0], hook[0], container.get("command", [""])[0]}
    assert {command for command in commands if command.startswith("outcrop")} == {path.name for path in BIN.iterdir()}
    assert all(os.access(path, os.X_OK) for path in BIN.iterdir())


@contextmanager
def http(answers: dict[str, tuple[int, str]]) -> Iterator[int]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answers[self.path]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: Any) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.needs("wget")
@pytest.mark.parametrize(
    ("raylet", "health", "kind", "is_ready"),
    [
        ("success", 200, "http", True),
        ("success", 503, "http", False),
        ("success", 503, "node", True),
        ("raylet is dead", 200, "http", False),
        ("raylet is dead", 200, "node", False),
    ],
)
def test_ready(raylet: str, health: int, kind: str, is_ready: bool) -> None:
    with http({"/api/local_raylet_healthz": (200, raylet)}) as agent, http({"/ready": (health, "{}")}) as serve:
        ports = {"RAY_AGENT_PORT": str(agent), "SERVE_PORT": str(serve)}
        done = subprocess.run([BIN / "outcrop-ready", kind], env=os.environ | ports, check=False)
    assert (done.returncode == 0) is is_ready


@pytest.mark.parametrize("client_stays", [False, True])
def test_drain_waits_for_connections_but_not_for_ever(client_stays: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client, server.accept()[0]:
            settings = os.environ | {"SERVE_PORT": str(port), "SETTLE_SECONDS": "0"}
            started = time.monotonic()
            drain = subprocess.Popen([BIN / "outcrop-drain", "4" if client_stays else "60"], env=settings)
            time.sleep(1.5)
            assert drain.poll() is None
            if not client_stays:
                client.close()
            assert drain.wait(20) == 0
    assert time.monotonic() - started >= (3 if client_stays else 1.5)


HOLD = (
    "import sys, time; from actors.process.readiness import show_in; show_in(*sys.argv[1:]); print(); time.sleep(600)"
)


@pytest.mark.needs("wget")
def test_a_pod_is_ready_while_an_actor_in_it_lives(tmp_path: Path) -> None:
    """However it ends: the kernel takes its lock away."""
    with http({"/api/local_raylet_healthz": (200, "success")}) as agent:
        settings = os.environ | {"RAY_AGENT_PORT": str(agent), "RAY_SESSION": str(tmp_path)}

        def is_ready() -> bool:
            return subprocess.run([BIN / "outcrop-ready", "actor"], env=settings, check=False).returncode == 0

        assert not is_ready(), "nothing has loaded"
        command = [sys.executable, "-c", HOLD, str(tmp_path / "outcrop-ready")]
        actors = [subprocess.Popen([*command, f"front-{n}"], cwd=ROOT, stdout=subprocess.PIPE) for n in range(2)]
        try:
            for actor in actors:
                assert actor.stdout
                actor.stdout.readline()
            for actor, others_live in zip(actors, (True, False), strict=True):
                assert is_ready()
                actor.kill()
                actor.wait()
                assert is_ready() is others_live
        finally:
            for actor in actors:
                actor.kill()


def test_linger_lets_a_lone_pod_go_and_outlasts_the_head() -> None:
    with socket.create_server(("127.0.0.1", free_port())) as head:  # nobody else listens there when it is gone
        settings = os.environ | {"RAY_ADDRESS": f"127.0.0.1:{head.getsockname()[1]}", "ANSWERS": "2"}
        alone = subprocess.run([BIN / "outcrop-linger", "600"], env=settings, timeout=60, check=False)
        assert alone.returncode == 0
    started = time.monotonic()
    assert subprocess.run([BIN / "outcrop-linger", "4"], env=settings, timeout=60, check=False).returncode == 0
    assert time.monotonic() - started >= 3


@pytest.fixture
def head() -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """With the environment that its pod has."""
    spec = dict(ray_groups(one(overlay("production"), "RayService")))["head"]
    env = spec["template"]["spec"]["containers"][0]["env"]
    with ray_head(env={each["name"]: each["value"] for each in env if "value" in each}) as started:
        yield started


def test_pods_outlast_a_head_that_is_told_to_stop(head: tuple[subprocess.Popen[bytes], str]) -> None:
    """It closes before a pod takes it for one that stays."""
    ray, address = head
    eventually(lambda: answers(address), "the head answers", 60)
    settings = os.environ | {"RAY_ADDRESS": address, "ANSWERS": "12"}
    staying = subprocess.Popen([BIN / "outcrop-linger", "20"], env=settings)
    started = time.monotonic()
    time.sleep(1.5)
    ray.terminate()  # the pod hears of the end first
    eventually(lambda: not answers(address), "the head has closed", 9)
    time.sleep(started + 15 - time.monotonic())
    assert staying.poll() is None
    assert staying.wait(60) == 0


@pytest.fixture
def fetch_model() -> ModuleType:
    """The script, which has no .py for import."""
    script = ModuleType("fetch_model")
    exec(compile((BIN / "outcrop-fetch-model").read_text(), "outcrop-fetch-model", "exec"), script.__dict__)
    return script


def test_fetch_model_downloads_checks_and_marks_once(
    fetch_model: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def download(hub_id: str, revision: str, local_dir: Path, allow_patterns: list[str]) -> None:
        calls.append((hub_id, revision))
        shutil.copytree(MODEL_DIR, local_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model = tmp_path / "model"
    fetch_model.fetch("owner/name", "abc", model)
    fetch_model.fetch("owner/name", "abc", model)
    assert calls == [("owner/name", "abc")]
    fetch_model.wait("owner/name@abc", model)
    with pytest.raises(SystemExit, match=r"holds owner/name@abc, not owner/name@def: give another directory"):
        fetch_model.fetch("owner/name", "def", model)
    assert len(calls) == 1, "pods may be reading it"


def test_fetch_model_does_not_mark_what_can_not_be_served(
    fetch_model: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: None)
    with pytest.raises(subprocess.CalledProcessError):
        fetch_model.fetch("owner/name", "abc", tmp_path)
    assert list(tmp_path.iterdir()) == []
