"""A Ray of several nodes on this machine, started as an operator starts it."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.e2e.servers import clean_environment, eventually, free_port, session

RAY = Path(sys.executable).with_name("ray")
ENV = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_max_direct_call_object_size": "4194304"}
HEAD, EXPERTS = {"outcrop_head": 8}, {"outcrop_expert": 2}


class Node:
    """`ray start --block` in a session of its own."""

    def __init__(self, *arguments: str, resources: dict[str, int]) -> None:
        command = [RAY, "start", "--block", "--disable-usage-stats", "--num-cpus=4", "--object-store-memory=100000000"]
        self.process = subprocess.Popen(
            [*command, f"--resources={json.dumps(resources)}", *arguments],
            env=clean_environment(ENV),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def kill(self) -> None:
        """As if its power had gone: nothing of it can say goodbye."""
        for process in session(self.process.pid):
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        self.process.wait(10)


@contextmanager
def ray_nodes(num_expert_nodes: int) -> Iterator[tuple[str, list[Node], list[str]]]:
    """Yields the cluster's address, its expert nodes, and the arguments that add another one."""
    temp_dir, port = tempfile.mkdtemp(prefix="oc-", dir="/tmp"), free_port()
    address = f"127.0.0.1:{port}"
    head = ("--head", f"--port={port}", "--node-ip-address=127.0.0.1", f"--temp-dir={temp_dir}")
    join = [f"--address={address}", "--node-ip-address=127.0.0.1"]
    nodes = [Node(*head, "--include-dashboard=false", resources=HEAD)]
    try:
        eventually(lambda: is_listening(port), "the head node listens", 60)
        for number in range(num_expert_nodes):  # one by one: two at once may choose the same ports
            nodes.append(Node(*join, resources=EXPERTS))
            eventually(lambda: num_raylets(temp_dir) == number + 2, "the node has joined", 60)  # noqa: B023
        yield address, nodes[1:], join
    finally:
        for node in reversed(nodes):
            node.kill()
        shutil.rmtree(temp_dir, ignore_errors=True)


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def num_raylets(temp_dir: str) -> int:
    return len(list(Path(temp_dir).glob("session_latest/sockets/raylet*")))
