"""The chart's application on a real Ray of several nodes, which is what Kubernetes would give it."""

import json
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest

from tests.k8s.manifests import ROOT, needs_helm

TIMEOUT_S = 280
pytestmark = needs_helm


def printed_by(module: str) -> Any:
    """In a process of its own: one process has one Ray, and other tests have theirs."""
    command = [sys.executable, "-m", module]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith(("{", "["))))


@pytest.mark.long
def test_the_autoscaler_makes_nodes_for_actors_and_takes_them_away() -> None:
    """Pools that start from zero: an actor that waits brings a node, and one that has left leaves a node that goes."""
    assert printed_by("tests.k8s.autoscaled") == [
        {"ingress": 1, "front": 1, "expert": 2},
        {"ingress": 1, "front": 1, "expert": 3},
        {"ingress": 1, "front": 1, "expert": 2},
    ]


def test_each_actor_lands_on_its_kind_of_node_and_serve_waits_for_all() -> None:
    told = printed_by("tests.k8s.on_ray")
    places = told["places"]
    assert told["statuses"] == ["DEPLOYING", "RUNNING"], "KubeRay moves on to a cluster that is RUNNING"
    kinds = {node: Counter(_kind(name) for name in names) for node, names in places.items()}
    assert kinds == {
        "head": {"SERVE_CONTROLLER_ACTOR": 1, "SERVE_PROXY_ACTOR": 1},
        "ingress": {"supervisor": 1, "gate": 1, "ingress": 1, "SERVE_PROXY_ACTOR": 1},
        "front": {"front": 1},
        "experts": {"expert": 1},
        "experts-a10g": {"expert": 1},
    }
    assert told["ready"] == ["expert-g0-r0", "expert-g1-r0", "front-0"]


def _kind(name: str) -> str:
    """Of `SERVE_REPLICA::outcrop#ingress#x`, `front-0`, `expert-g0-r0`, `SERVE_PROXY_ACTOR-x`."""
    return name.split("#")[1] if "#" in name else name.split("-")[0]
