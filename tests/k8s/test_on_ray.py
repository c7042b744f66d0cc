"""The overlay `production` on a real Ray of several nodes, which is what Kubernetes would give it."""

import json
import subprocess
import sys
from collections import Counter

from tests.k8s.manifests import ROOT

TIMEOUT_S = 280


def test_each_actor_lands_on_its_kind_of_node_and_serve_waits_for_all() -> None:
    # A process of its own: one process has one Ray, and other tests have theirs.
    command = [sys.executable, "-m", "tests.k8s.on_ray"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    places = told["places"]
    assert told["statuses"] == ["DEPLOYING", "RUNNING"], "KubeRay moves on to a cluster that is RUNNING"
    kinds = {node: Counter(_kind(name) for name in names) for node, names in places.items()}
    assert kinds == {
        "head": {"SERVE_CONTROLLER_ACTOR": 1, "SERVE_PROXY_ACTOR": 1},
        "ingress": {"supervisor": 1, "gate": 1, "ingress": 1, "SERVE_PROXY_ACTOR": 1},
        "front-l40s": {"front": 1},
        "experts-l4": {"expert": 1},
        "experts-a10g": {"expert": 1},
    }


def _kind(name: str) -> str:
    """Of `SERVE_REPLICA::outcrop#ingress#x`, `front-0`, `expert-g0-r0`, `SERVE_PROXY_ACTOR-x`."""
    return name.split("#")[1] if "#" in name else name.split("-")[0]
