"""The image's steps for CPUs, as the Dockerfile has them, in a directory of their own instead of a container; then what
pods run, as their user. Not the Debian packages of the base image, and no layers.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

import httpx
import pytest

from tests.e2e.servers import eventually, free_port
from tests.k8s.manifests import K8S, ROOT

DOCKERFILE = (K8S / "Dockerfile").read_text().replace("\\\n", " ")
USER = ["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", "--no-new-privs"]
pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(os.geteuid() != 0, reason="to become user 1000 takes root"),
]


class Root:
    """Where the image's / would be."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.environment = {"PATH": f"{path}/opt/outcrop/bin:{path}/usr/local/bin:{os.environ['PATH']}"}
        self.environment["LD_LIBRARY_PATH"] = f"{path}/usr/local/lib"
        # The base image's Python is in /usr/local. Ours may be where user 1000 has no access.
        skipped = shutil.ignore_patterns("site-packages", "test", "__pycache__")
        shutil.copytree(sys.base_prefix, path / "usr/local", symlinks=True, ignore=skipped)
        subprocess.run([path / "usr/local/bin/python3", "-m", "ensurepip"], check=True, stdout=subprocess.DEVNULL)

    def moved(self, text: str) -> str:
        return re.sub(r"(?<![\w.])/(opt/outcrop|usr/local/bin|build)\b", rf"{self.path}/\1", text)

    def build(self) -> None:
        """Stage by stage. apt-get is the base image's business."""
        pip = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_", "HOME"))}
        where = self.path / "build"
        for kind, text in re.findall(r"^(RUN|COPY) (.+)$", DOCKERFILE, re.MULTILINE):
            if kind == "COPY":
                self._copy(shlex.split(text), where)
                continue
            steps = [step for step in text.split("&&") if not re.match(r"\s*(apt-get|rm -rf /var|useradd|echo)", step)]
            if steps:
                where.mkdir(exist_ok=True)
                command = self.moved("&&".join(steps)).replace('--index-url "${TORCH_INDEX}"', "")
                subprocess.run(["bash", "-euc", command], cwd=where, env=self.environment | pip, check=True)

    def _copy(self, words: list[str], where: Path) -> None:
        *sources, target = [word for word in words if not word.startswith("--")]
        if any(word.startswith("--from") for word in words):
            return  # from the other stage, which is here already
        for source in sources:
            into = Path(self.moved(target)) if target.startswith("/") else where / target
            if (ROOT / source).is_dir():
                shutil.copytree(
                    ROOT / source, into, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.so", "__pycache__")
                )
            else:
                into = into / Path(source).name if target.endswith("/") else into
                into.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / source, into)


@pytest.fixture(scope="module")
def root() -> Iterator[Root]:
    with TemporaryDirectory(prefix="outcrop-", dir="/tmp") as path:
        Path(path).chmod(0o755)
        found = Root(Path(path))
        found.build()
        home = Path(path, "home/ray")
        home.mkdir(parents=True)
        os.chown(home, 1000, 1000)
        shutil.rmtree(Path(path, "build"))  # the image has no build stage: nothing may need it
        found.environment |= {"HOME": str(home), "LANG": "C.UTF-8"}
        yield found


def run(root: Root, *command: str) -> subprocess.CompletedProcess[str]:
    where = root.environment["HOME"]
    return subprocess.run(
        [*USER, *command], cwd=where, env=root.environment, capture_output=True, text=True, check=False
    )


def test_what_is_installed_fits_together_and_has_the_kernels(root: Root) -> None:
    checked = run(root, "pip", "check")
    assert checked.returncode == 0, checked.stderr
    found = run(root, "outcrop", "check", "demo")
    assert found.returncode == 0, found.stderr
    assert list(root.path.glob("opt/outcrop/lib/python3*/site-packages/actors/kernels/*.so"))
    assert run(root, "ray", "--version").stdout.split()[-1].startswith("2.60")


def test_the_scripts_start(root: Root) -> None:
    assert run(root, "outcrop-ready", "node").returncode != 0, "no Ray is there"
    assert run(root, "outcrop-drain", "1").returncode == 0, "no connection is there"
    unmarked = run(root, "outcrop-fetch-model", "owner/name", "main", f"{root.environment['HOME']}/model")
    assert "huggingface_hub" in unmarked.stderr, "it has looked for the model"


def test_the_image_serves(root: Root) -> None:
    """Its own command, on another port."""
    port = free_port()
    (words,) = re.findall(r"^CMD (.+)$", DOCKERFILE, re.MULTILINE)
    command = [word.replace("0.0.0.0", "127.0.0.1") for word in json.loads(words)]
    settings = root.environment | {"RAY_ADDRESS": "local", "OUTCROP_PORT": str(port)}
    with TemporaryFile() as log:
        server = subprocess.Popen([*USER, *command], cwd=settings["HOME"], env=settings, stdout=log, stderr=log)

        def is_healthy() -> bool:
            assert server.poll() is None, os.pread(log.fileno(), 10_000, 0).decode()
            try:
                return httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200
            except httpx.TransportError:
                return False

        try:
            eventually(is_healthy, "/health answers 200", 120)
        finally:
            server.terminate()
            assert server.wait(60) == 0
