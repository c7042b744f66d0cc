"""Random faults for a while (CHAOS_SECONDS, CHAOS_SEED), and nothing grows: memory, files, sockets, threads, shared
memory, KV blocks. `make chaos-long` runs half an hour.
"""

import os
import random
import time
from dataclasses import dataclass, fields
from pathlib import Path

import psutil
import pytest

from tests.chaos.conftest import CLIENTS, FLAGS, PROMPTS, TOKENS
from tests.chaos.faults import BREAKING, FAULTS, is_whole
from tests.chaos.load import Load, print_table
from tests.e2e.servers import Server, eventually, serving

SECONDS = float(os.environ.get("CHAOS_SECONDS", "15"))
SEED = int(os.environ.get("CHAOS_SEED", "1"))
ALL = FAULTS | BREAKING
# Ray keeps idle workers and connections for a while; a leak grows with each fault.
TOLERANCE = 1.25


@dataclass(frozen=True, slots=True)
class Usage:
    """What all processes of a server hold together."""

    memory_mib: int
    open_files: int
    sockets: int
    threads: int
    processes: int
    shared_memory_files: int

    @classmethod
    def of(cls, server: Server) -> "Usage":
        found = server.processes()
        return cls(
            sum(p.memory_full_info().pss for p in found) >> 20,
            sum(p.num_fds() for p in found),
            sum(len(p.net_connections("all")) for p in found),
            sum(p.num_threads() for p in found),
            len(found),
            len(list(Path("/dev/shm").iterdir())),
        )


def usage(server: Server) -> Usage:
    """Processes may end while they are asked."""
    for _ in range(20):
        try:
            return Usage.of(server)
        except psutil.NoSuchProcess:
            time.sleep(0.2)
    raise AssertionError("processes keep ending")


@pytest.mark.long
@pytest.mark.timeout(SECONDS + 400)
def test_random_faults_leave_nothing_behind(model_dir: Path, expected: list[list[int]]) -> None:
    dice = random.Random(SEED)
    with serving(model_dir, "--groups", "2", "--replicas", "2", "--fronts", "2", *FLAGS) as server:
        with Load(server, CLIENTS, TOKENS, PROMPTS) as load:
            load.wait_for(1)
            for name in ("kill one replica", "kill one front of two"):  # what comes only once has come
                FAULTS[name](server)
                eventually(lambda: is_whole(server), "healed", 60)
            load.wait_for(1)
            rate, before = load.throughput(3), usage(server)
            deadline = time.monotonic() + SECONDS
            drawn: list[str] = []
            while time.monotonic() < deadline and not load.errors:
                drawn.append(dice.choice(list(ALL)))
                with load.breaking(drawn[-1] in BREAKING):
                    ALL[drawn[-1]](server)
                    eventually(lambda: is_whole(server), f"healed after {drawn[-1]!r}", 90)
                    load.wait_for(1)
                time.sleep(dice.random())
            load.wait_for(1)
            after, stall = usage(server), load.take_stall()
            recovered = load.throughput(3) / rate
        name = f"{len(drawn)} random faults, the last: {drawn[-1]}"
        print_table([load.outcome(name, expected, 0.0, stall, recovered)])
        for field in fields(Usage):
            print(f"{field.name:20} {getattr(before, field.name):7d} -> {getattr(after, field.name):7d}")
        load.check(expected)
        server.wait_idle()
        for field in fields(Usage):
            assert getattr(after, field.name) <= TOLERANCE * getattr(before, field.name) + 20, field.name
