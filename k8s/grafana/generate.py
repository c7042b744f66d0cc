"""Write the Grafana dashboards overview.json and experts.json.

    python k8s/grafana/generate.py            write them
    python k8s/grafana/generate.py --check    fail if they are not what this script would write

Either way it fails when a panel queries a metric that cluster/metrics.py does not define.
"""

import json
import re
import sys
from pathlib import Path

from experts import EXPERTS
from overview import OVERVIEW
from panels import Json

from cluster.metrics import TABLE

HERE = Path(__file__).parent
DASHBOARDS = {"overview.json": OVERVIEW, "experts.json": EXPERTS}


def undefined(board: Json) -> list[str]:
    """Metrics that a dashboard queries although no process records them."""
    suffixes = {"histogram": ("_bucket", "_count", "_sum"), "gauge": ("",), "counter": ("",)}
    defined = {definition.name + suffix for definition in TABLE for suffix in suffixes[definition.kind]}
    queried = re.findall(r"outcrop_(\w+)", " ".join(t["expr"] for p in board["panels"] for t in p.get("targets", ())))
    return sorted(set(queried) - defined)


def main(arguments: list[str]) -> int:
    """The exit code: 1 for an undefined metric, or when --check finds a difference."""
    wrong = []
    for name, board in DASHBOARDS.items():
        wrong += [f"{name} queries outcrop_{metric}, which cluster/metrics.py lacks" for metric in undefined(board)]
        text = json.dumps(board, indent=1) + "\n"
        if arguments != ["--check"]:
            (HERE / name).write_text(text)
        elif not (HERE / name).exists() or (HERE / name).read_text() != text:
            wrong.append(f"{name} is stale: run k8s/grafana/generate.py")
    print("\n".join(wrong) or "dashboards are up to date")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
