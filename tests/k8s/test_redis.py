"""What a head is without its Redis, and what it is again with it: the claims of docs/kubernetes.md."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.e2e.servers import eventually, free_port
from tests.k8s.heads import answers, ray_head

pytestmark = [pytest.mark.long, pytest.mark.needs("redis-server")]
# In a process of its own: one process has one Ray.
KEEP = "import ray, sys; from ray.experimental import internal_kv as kv; ray.init(sys.argv[1], log_to_driver=False); "
PUT, GET = KEEP + "kv._internal_kv_put(b'kept', b'yes')", KEEP + "print(kv._internal_kv_get(b'kept'))"


@contextmanager
def redis(port: int, directory: Path) -> Iterator[None]:
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--dir", str(directory)]
    process = subprocess.Popen([*command, "--appendonly", "yes"], stdout=subprocess.DEVNULL)
    try:
        eventually(lambda: answers(f"127.0.0.1:{port}"), "Redis answers", 20)
        yield
    finally:
        process.kill()
        process.wait()


def run(code: str, address: str) -> str:
    command = [sys.executable, "-c", code, address]
    return subprocess.run(command, env=os.environ, capture_output=True, text=True, check=True, timeout=60).stdout


def test_a_head_ends_with_redis_and_comes_back_with_its_state(tmp_path: Path) -> None:
    port, head_port = free_port(), free_port()
    env = {"RAY_external_storage_namespace": "a-cluster", "RAY_REDIS_ADDRESS": f"127.0.0.1:{port}"}
    with TemporaryDirectory(prefix="outcrop-", dir="/tmp") as temp_dir:  # the same again, as it is in pods
        head = partial(ray_head, f"--temp-dir={temp_dir}", port=head_port, env=env)
        with head() as (_, address):
            with redis(port, tmp_path):
                eventually(lambda: answers(address), "the head answers", 60)
                run(PUT, address)
            eventually(lambda: not answers(address), "the head has closed", 60)
        with redis(port, tmp_path), head() as (_, address):
            eventually(lambda: answers(address), "the head is back", 60)
            assert "yes" in run(GET, address)
