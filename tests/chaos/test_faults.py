"""Faults under streaming load: no request fails, and no token changes. Prints a table of stalls (`make chaos`).

Stalls are reported, not asserted: these machines are shared. What must hold is 0 failed requests and equal tokens.
A client whose ingress is killed may see its connection end: such requests are counted apart, as broken.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.conftest import CLIENTS, FLAGS, PROMPTS, TOKENS
from tests.chaos.faults import (
    BREAKING,
    FAULTS,
    Fault,
    cut,
    freeze,
    ingress_pid,
    is_whole,
    kill,
    kill_supervisor_without_checkpoint,
    leave_in_mid_answer,
    pids,
    scale,
    supervisor_pid,
)
from tests.chaos.load import Load, Outcome, print_table
from tests.e2e.servers import Server, eventually, serving

# Throughput before and after is counted over so many seconds. It is printed only: `make chaos` asks for more of them.
RATE_S = float(os.environ.get("CHAOS_RATE_S", "0.2"))
ROWS: list[Outcome] = []


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    yield
    print_table(ROWS)


@pytest.fixture(scope="module")
def server(model_dir: Path) -> Iterator[Server]:
    with serving(model_dir, "--groups", "2", "--replicas", "2", "--fronts", "2", *FLAGS) as running:
        yield running


def check(server: Server, expected: list[list[int]], name: str, fault: Fault, num_choices: int = 1) -> None:
    eventually(lambda: is_whole(server), "all actors are ready", 60)
    load = Load(server, CLIENTS, TOKENS, PROMPTS, num_choices)
    usual = stall = recovered = 0.0
    try:
        with load:
            load.wait_for(1)
            load.take_stall()
            before = load.throughput(RATE_S)
            load.wait_for(1)
            usual = load.take_stall()
            with load.breaking(name in BREAKING):
                fault(server)
                load.wait_for(2)
            stall = load.take_stall()
            with load.eased():
                eventually(lambda: is_whole(server), "the cluster has healed", 60)
            load.wait_for(1)
            recovered = load.throughput(RATE_S) / before
    finally:
        ROWS.append(load.outcome(name, expected, usual, stall, recovered))
    load.check(expected)
    server.wait_idle()


# They break everything once, in half a minute each; `make chaos` runs the others.
SHORT = {"kill a front, a replica and the supervisor", "kill the ingress"}
ALL = FAULTS | BREAKING


@pytest.mark.parametrize("fault", [f if f in SHORT else pytest.param(f, marks=pytest.mark.long) for f in ALL])
def test_no_request_fails_and_no_token_changes(server: Server, expected: list[list[int]], fault: str) -> None:
    check(server, expected, fault, ALL[fault])


@pytest.mark.long
def test_ids_that_clients_send_are_never_keys(server: Server, expected: list[list[int]]) -> None:
    """Clients with equal ids, and two choices of one request, are replayed side by side. See Load for the ids."""
    check(server, expected, "kill one front of two, n=2", FAULTS["kill one front of two"], num_choices=2)


@pytest.mark.long
def test_faults_in_short_succession(server: Server, expected: list[list[int]]) -> None:
    def break_many(server: Server) -> None:
        cut(server, 2)
        freeze(ingress_pid(server), 3)
        leave_in_mid_answer(server, 100)
        kill_supervisor_without_checkpoint(server, 2)

    check(server, expected, "cut, freeze, leave, kill without checkpoint", break_many)


def test_operators_are_answered_over_the_loss_of_the_supervisor(server: Server) -> None:
    eventually(lambda: is_whole(server), "all actors are ready", 60)
    kill(supervisor_pid(server))
    assert server.get("/health").status_code == 200, "requests are served all the same"
    scale(server, group="all", replicas=2)  # asks again while the answer is 503, then waits


@pytest.fixture
def small(server: Server) -> Iterator[Server]:
    """One front, and one replica of each group."""
    eventually(lambda: is_whole(server), "all actors are ready", 60)
    scale(server, group="all", replicas=1, fronts=1)
    yield server
    scale(server, group="all", replicas=2, fronts=2)


def test_the_only_replica_of_a_group_and_the_only_front(small: Server, expected: list[list[int]]) -> None:
    """What is missing is computed by the front itself, or waited for."""
    (only,) = (row["id"] for row in small.get("/v1/cluster").json()["replicas"] if row["group"] == 0)
    place = {"group": "0", "replica": only.partition(".")[0]}  # its successors have it after it
    before = small.metric("local_fallback_tokens_total")
    check(small, expected, "kill the only replica of a group", lambda s: kill(*pids(s, "replicas", 0)))
    assert small.metric("local_fallback_tokens_total") > before
    before = small.metric("expert_tokens_total", **place)
    check(small, expected, "kill the only front", lambda s: kill(*pids(s, "fronts")))
    assert small.metric("expert_tokens_total", **place) > before, "it is used again"


@pytest.mark.long
@pytest.mark.timeout(900)
def test_one_replica_after_the_other(server: Server, expected: list[list[int]]) -> None:
    """20 in a row, each as soon as its predecessor's successor serves."""

    def kill_many(server: Server) -> None:
        for number in range(20):
            eventually(lambda: is_whole(server), "healed", 60)
            alive = pids(server, "replicas")
            kill(alive[number % len(alive)])
            time.sleep(1)  # until it is noticed

    check(server, expected, "kill 20 replicas in a row", kill_many)


@pytest.mark.long
def test_over_object_refs(model_dir: Path, expected: list[list[int]]) -> None:
    with serving(model_dir, "--groups", "2", "--replicas", "2", "--lane", "object_ref", *FLAGS) as server:
        check(server, expected, "object_ref: kill one replica", lambda s: kill(pids(s, "replicas", 0)[0]))
        check(server, expected, "object_ref: freeze one replica", lambda s: freeze(pids(s, "replicas", 0)[0], 10))
