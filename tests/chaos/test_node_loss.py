"""A whole node is lost: several raylets on this machine, one of them killed with everything that runs on it."""

import json
import signal
from pathlib import Path

import psutil
import pytest

from tests.chaos.conftest import CLIENTS, FLAGS, PROMPTS, TOKENS
from tests.chaos.faults import is_whole
from tests.chaos.faults import pids as all_pids
from tests.chaos.load import Load, print_table
from tests.e2e.nodes import ENV, EXPERTS, Node, ray_nodes
from tests.e2e.servers import Server, eventually, session


@pytest.mark.long
@pytest.mark.timeout(400)
def test_a_node_with_two_replicas_is_lost(model_dir: Path, expected: list[list[int]]) -> None:
    on_head, on_experts = json.dumps({"outcrop_head": 1}), json.dumps({"outcrop_expert": 1})
    flags = ["--groups", "2", "--replicas", "2", "--cpus-per-front", "0", "--cpus-per-replica", "0"]
    flags += ["--front-resources", on_head, "--ingress-resources", on_head, "--replica-resources", on_experts]
    with ray_nodes(2) as (address, nodes, join):
        server = Server(model_dir, *flags, *FLAGS, env=ENV | {"RAY_ADDRESS": address})
        try:
            server.wait_ready()
            pids = {p.pid for p in session(nodes[0].process.pid)}
            victims = [r["id"] for r in server.get("/v1/cluster").json()["replicas"] if r["pid"] in pids]
            assert len(victims) == 2, "two replicas run on the node that will be lost"
            with Load(server, CLIENTS, TOKENS, PROMPTS) as load:
                load.wait_for(1)
                load.take_stall()
                before = load.throughput(3)
                usual = load.take_stall()
                nodes[0].kill()
                load.wait_for(3)
                stall = load.take_stall()
                nodes[0] = Node(*join, resources=EXPERTS)
                eventually(lambda: is_whole(server), "the lost replicas are on the new node", 120)
                load.wait_for(1)
                recovered = load.throughput(3) / before
            print_table([load.outcome("lose a node", expected, usual, stall, recovered)])
            load.check(expected)
            server.wait_idle()
            actors = [*all_pids(server, "fronts"), *all_pids(server, "replicas")]
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(60) == 0, server.log
            eventually(lambda: not any(map(psutil.pid_exists, actors)), "a cluster that is not ours is left as it was")
        finally:
            server.kill()
