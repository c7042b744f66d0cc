"""Faults under streaming load: no request fails, and no token changes. Prints a table of stalls (`make chaos`).

Stalls are reported, not asserted: these machines are shared. What must hold is 0 failed requests and equal tokens.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.chaos.load import Load
from tests.checkpoints import MODELS, generate, load_reference, write_checkpoint
from tests.e2e.servers import Server, eventually, serving

TOKENS = 48
CLIENTS = 8
PROMPTS = [[(11 * i + 7 * j) % 250 for i in range(length)] for j, length in enumerate((5, 30, 70, 12))]
ROWS: list[tuple[str, int, int, float]] = []


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(MODELS["granite"], tmp_path_factory.mktemp("granite"))


@pytest.fixture(scope="module")
def expected(model_dir: Path) -> list[list[int]]:
    reference = load_reference(model_dir)
    return [generate(reference, prompt, TOKENS) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def server(model_dir: Path) -> Iterator[Server]:
    with serving(model_dir, "--groups", "2", "--replicas", "2", "--fronts", "2", "--dtype", "float32") as running:
        yield running
    width = max(len(row[0]) for row in ROWS)
    print(f"\n{'fault':{width}}  requests  failed  longest stall")
    for fault, num_requests, num_failed, stall in ROWS:
        print(f"{fault:{width}}  {num_requests:8d}  {num_failed:6d}  {stall:11.2f} s")


def pids(server: Server, kind: str, group: int | None = None) -> list[int]:
    rows = server.get("/v1/cluster").json()[kind]
    return [row["pid"] for row in rows if row["state"] == "ready" and (group is None or row["group"] == group)]


def kill(*victims: int) -> None:
    for pid in victims:
        os.kill(pid, signal.SIGKILL)


def freeze(pid: int) -> None:
    """A process that hangs, and wakes up again later."""
    os.kill(pid, signal.SIGSTOP)
    time.sleep(3)
    os.kill(pid, signal.SIGCONT)


def supervisor_pid(server: Server) -> int:
    (found,) = [p.pid for p in server.processes() if "supervisor" in " ".join(p.cmdline())]
    return found


FAULTS: dict[str, Callable[[Server], None]] = {
    "kill one replica": lambda s: kill(pids(s, "replicas", 0)[0]),
    "kill one replica of each group": lambda s: kill(pids(s, "replicas", 0)[0], pids(s, "replicas", 1)[1]),
    "kill a whole group": lambda s: kill(*pids(s, "replicas", 1)),
    "freeze one replica for 3 s": lambda s: freeze(pids(s, "replicas", 0)[0]),
    "kill one front of two": lambda s: kill(pids(s, "fronts")[0]),
    "kill all fronts": lambda s: kill(*pids(s, "fronts")),
    "kill the supervisor": lambda s: kill(supervisor_pid(s)),
    "kill a front and a group at once": lambda s: kill(pids(s, "fronts")[0], *pids(s, "replicas", 0)),
}


def is_whole(server: Server) -> bool:
    state = server.get("/v1/cluster").json()
    ready = [row for row in state["fronts"] + state["replicas"] if row["state"] == "ready"]
    return state["state"] == "ready" and len(ready) == 6


@pytest.mark.parametrize("fault", FAULTS)
def test_no_request_fails_and_no_token_changes(server: Server, expected: list[list[int]], fault: str) -> None:
    eventually(lambda: is_whole(server), "all actors are ready", 60)
    with Load(server, CLIENTS, TOKENS, PROMPTS) as load:
        load.wait_for(1)
        load.take_stall()
        FAULTS[fault](server)
        load.wait_for(2)
        stall = load.take_stall()
        eventually(lambda: is_whole(server), "the cluster has healed", 60)
        load.wait_for(1)
    ROWS.append((fault, load.num_requests, len(load.errors), stall))
    assert load.errors == []
    for i, stream in enumerate(load.streams):
        assert all(answer == expected[i % len(PROMPTS)] for answer in stream.answers), f"client {i}"
    server.wait_idle()
