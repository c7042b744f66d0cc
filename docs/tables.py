"""Fills the tables of settings and metrics in docs/reference.md from the code: `python docs/tables.py [--check]`."""

import sys
from pathlib import Path

from benchmarks.markdown import main, table
from cluster.config import ClusterConfig
from cluster.metrics import PREFIX
from cluster.metrics import TABLE as METRICS

PAGE = Path(__file__).parent / "reference.md"


def settings() -> str:
    rows = []
    for name, field in ClusterConfig.model_fields.items():
        default = "required" if field.is_required() else "-" if field.default is None else field.default
        rows.append([f"`{name}`", str(default), str(field.description)])
    return table(["setting", "default", "what"], rows, "---")


def metrics() -> str:
    rows = [[f"`{PREFIX}{each.name}`", each.kind, ", ".join(each.labels) or "-", each.help] for each in METRICS]
    return table(["metric", "type", "labels", "what"], rows, "---")


if __name__ == "__main__":
    sys.exit(main(PAGE, {"settings": settings, "metrics": metrics}, sys.argv[1:]))
