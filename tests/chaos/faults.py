"""Faults by name, against a live server: processes killed and frozen by pid, numbers changed by its own API."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress

import httpx

from tests.e2e.servers import Server, eventually

Fault = Callable[[Server], None]


def pids(server: Server, kind: str, group: int | None = None) -> list[int]:
    """Processes of the ready members of a kind ("fronts" or "replicas"). Waits for one: the fault before may have
    taken them all, and be noticed only now.
    """
    found: list[int] = []

    def look() -> bool:
        rows = server.get("/v1/cluster").json()[kind]
        found[:] = [r["pid"] for r in rows if r["state"] == "ready" and group in (None, r["group"])]
        return bool(found)

    eventually(look, f"some of the {kind} are ready", 60)
    return found


def kill(*victims: int) -> None:
    for pid in victims:
        with suppress(ProcessLookupError):  # the fault before took it, and nobody has noticed yet
            os.kill(pid, signal.SIGKILL)


def freeze(pid: int, seconds: float) -> None:
    """A process that hangs, and wakes up again later."""
    os.kill(pid, signal.SIGSTOP)
    time.sleep(seconds)
    os.kill(pid, signal.SIGCONT)


def supervisor_pid(server: Server) -> int:
    """Waits for it, as pids() does."""

    found: list[int] = []

    def look() -> bool:
        found[:] = [p.pid for p in server.processes() if "supervisor" in " ".join(p.cmdline())]
        return len(found) == 1

    eventually(look, "there is a supervisor", 60)
    return found[0]


def post(server: Server, path: str, body: dict[str, object]) -> dict[str, object]:
    """503: the supervisor is being restarted. Moving the experts of a large model takes minutes on busy cores."""
    for _ in range(60):
        answer = httpx.post(server.url + path, json=body, timeout=600, trust_env=False)
        if answer.status_code != 503:
            break
        time.sleep(0.5)
    assert answer.status_code == 200, answer.text
    found: dict[str, object] = answer.json()
    return found


def scale(server: Server, **numbers: object) -> None:
    """Change the numbers and wait until they are true."""
    post(server, "/v1/cluster/scale", numbers)
    eventually(lambda: is_whole(server), f"scaled to {numbers}", 90)


def is_whole(server: Server) -> bool:
    """Everything that is wanted is ready, and nothing else is there."""
    cluster = server.get("/v1/cluster").json()
    rows = cluster["fronts"] + cluster["replicas"]
    number = cluster["wanted"]["fronts"] + sum(cluster["wanted"]["replicas"]) if cluster["wanted"] else 0
    return cluster["state"] == "ready" and len(rows) == number and all(row["state"] == "ready" for row in rows)


def up_and_down(server: Server) -> None:
    scale(server, group="all", replicas=3)
    scale(server, group="all", replicas=1)
    scale(server, group="all", replicas=2)


def fronts_up_and_down(server: Server) -> None:
    scale(server, fronts=3)
    scale(server, fronts=1)
    scale(server, fronts=2)


def rebalance(server: Server) -> None:
    post(server, "/v1/cluster/rebalance", {"force": True})


# Against 2 fronts and 2 groups x 2 replicas.
FAULTS: dict[str, Fault] = {
    "kill one replica": lambda s: kill(pids(s, "replicas", 0)[0]),
    "kill one replica of each group": lambda s: kill(pids(s, "replicas", 0)[0], pids(s, "replicas", 1)[-1]),
    "kill a whole group": lambda s: kill(*pids(s, "replicas", 1)),
    "freeze one replica for 10 s": lambda s: freeze(pids(s, "replicas", 0)[0], 10),
    "kill one front of two": lambda s: kill(pids(s, "fronts")[0]),
    "kill all fronts": lambda s: kill(*pids(s, "fronts")),
    "kill the supervisor": lambda s: kill(supervisor_pid(s)),
    "kill a front, a replica and the supervisor": lambda s: kill(
        pids(s, "fronts")[0], pids(s, "replicas", 0)[0], supervisor_pid(s)
    ),
    "replicas 2 -> 3 -> 1 -> 2": up_and_down,
    "fronts 2 -> 3 -> 1 -> 2": fronts_up_and_down,
    "rebalance": rebalance,
}
