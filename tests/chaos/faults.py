"""Faults by name, against a live server: processes killed and frozen by pid, connections cut, files taken away,
numbers changed by its own API.
"""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import httpx
import psutil

from tests.chaos.connections import shut_down
from tests.e2e.servers import PLAIN, Server, eventually

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


def serve_pid(server: Server, deployment: str) -> int:
    """Process of the one replica of a Serve deployment: "supervisor" or "ingress". Waits for it, as pids() does."""
    found: list[int] = []

    def look() -> bool:
        found[:] = [p.pid for p in server.processes() if is_replica(p)]
        return len(found) == 1

    def is_replica(process: psutil.Process) -> bool:
        with suppress(psutil.NoSuchProcess):  # it ends while it is looked at
            title = " ".join(process.cmdline())
            return "ServeReplica" in title and f":{deployment}" in title
        return False

    eventually(look, f"there is one {deployment}", 60)
    return found[0]


def supervisor_pid(server: Server) -> int:
    return serve_pid(server, "supervisor")


def ingress_pid(server: Server) -> int:
    return serve_pid(server, "ingress")


def post(server: Server, path: str, body: dict[str, object]) -> dict[str, object]:
    """503: the supervisor is being restarted. Moving the experts of a large model takes minutes on busy cores."""
    for _ in range(60):
        answer = httpx.post(server.url + path, json=body, timeout=600, **PLAIN)
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
    answer = server.get("/v1/cluster")
    if answer.status_code != 200:  # the ingress is being restarted
        return False
    cluster = answer.json()
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


def kill_while_rebalancing(server: Server) -> None:
    """The supervisor and a replica, while the supervisor waits for a frozen replica to load what moves to it."""
    frozen, victim = pids(server, "replicas", 0)[0], pids(server, "replicas", 1)[-1]
    asker = threading.Thread(target=ask_for_rebalance, args=(server,), daemon=True)
    eventually(lambda: can_rebalance(server), "there is something to move", 60)
    os.kill(frozen, signal.SIGSTOP)
    asker.start()
    time.sleep(1)
    kill(supervisor_pid(server), victim)
    os.kill(frozen, signal.SIGCONT)
    asker.join(60)
    assert not asker.is_alive(), "whoever asked for the rebalance still waits"


def can_rebalance(server: Server) -> bool:
    return post(server, "/v1/cluster/rebalance", {"force": True, "dry_run": True})["experts_moved"] != 0


def ask_for_rebalance(server: Server) -> None:
    """Any answer will do: who would have given the right one is gone."""
    httpx.post(f"{server.url}/v1/cluster/rebalance", json={"force": True}, timeout=120, **PLAIN)


def cut(server: Server, seconds: float) -> None:
    """Connections from the ingress to the fronts, also those that it opens anew."""
    ingress = psutil.Process(ingress_pid(server))
    fronts = [psutil.Process(pid).net_connections("tcp") for pid in pids(server, "fronts")]
    ports = {c.laddr.port for connections in fronts for c in connections if c.status == psutil.CONN_LISTEN}
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for connection in ingress.net_connections("tcp"):
            if connection.raddr and connection.raddr.port in ports:
                shut_down(ingress.pid, connection.fd)
        time.sleep(0.01)


def kill_supervisor_without_checkpoint(server: Server, seconds: float) -> None:
    """Its successor finds no config.json for a while."""
    config, killed = server.model_dir / "config.json", supervisor_pid(server)
    away = config.rename(config.with_suffix(".away"))
    try:
        kill(killed)
        eventually(lambda: supervisor_pid(server) != killed, "the supervisor has a successor", 60)
        time.sleep(seconds)
    finally:
        away.rename(config)


def leave_in_mid_answer(server: Server, num_clients: int) -> None:
    body = {"prompt": [1, 2, 3], "max_tokens": 200, "temperature": 0, "ignore_eos": True, "stream": True}

    async def leave(client: httpx.AsyncClient, num_events: int) -> None:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200, await response.aread()
            async for line in response.aiter_lines():
                num_events -= line.startswith("data: ")
                if num_events < 0:
                    return
        raise AssertionError("the answer ended before its client left")

    async def leave_all() -> None:
        limits = httpx.Limits(max_connections=num_clients)
        async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits, trust_env=False) as client:
            await asyncio.gather(*(leave(client, number % 8) for number in range(num_clients)))

    asyncio.run(leave_all())


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
    "kill the supervisor and a replica in a rebalance": kill_while_rebalancing,
    "kill the supervisor, no config.json for 12 s": lambda s: kill_supervisor_without_checkpoint(s, 12),
    "freeze the ingress for 3 s": lambda s: freeze(ingress_pid(s), 3),
    "freeze the ingress beyond its lease": lambda s: freeze(ingress_pid(s), 33),
    "cut ingress from fronts for 2 s": lambda s: cut(s, 2),
    "a hundred clients leave in mid-answer": lambda s: leave_in_mid_answer(s, 100),
}
# Whoever is served by an ingress loses the connection with it, and may ask again.
BREAKING: dict[str, Fault] = {"kill the ingress": lambda s: kill(ingress_pid(s))}
