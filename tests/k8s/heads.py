"""A real head node of Ray, started as KubeRay starts it, and ended with all that it has started."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from ray.util import get_node_ip_address

from tests.e2e.servers import free_port, session

STORE = 90 * 2**20
START = ["start", "--head", "--block", "--num-cpus=0", "--include-dashboard=false", f"--object-store-memory={STORE}"]


@contextmanager
def ray_head(*flags: str, port: int = 0, env: Mapping[str, str]) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`ray start --block`, and the address at which it will answer."""
    port = port or free_port()
    with TemporaryDirectory(prefix="outcrop-", dir="/tmp") as temp_dir:  # short: paths of sockets have 107 characters
        command = [Path(sys.executable).with_name("ray"), *START, f"--port={port}", f"--temp-dir={temp_dir}", *flags]
        process = subprocess.Popen(
            command,
            env=os.environ | dict(env),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            yield process, f"{get_node_ip_address()}:{port}"
        finally:
            for each in session(process.pid):
                each.kill()
            process.wait(10)


def answers(address: str) -> bool:
    """Whether something listens at HOST:PORT."""
    host, _, port = address.partition(":")
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((host, int(port))) == 0
