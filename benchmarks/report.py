"""How results are shown: a table in the terminal, and what machine they come from."""

import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    shown = Table(*columns)
    for row in rows:
        shown.add_row(*row)
    Console(width=max(120, Console().width)).print(shown)


def environment() -> dict[str, Any]:
    """Enough to judge whether two results may be compared, and to measure again."""
    from actors.compute import Compute, describe  # late: threads are limited before torch is imported

    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), "unknown")
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "bfloat16": list(describe(Compute.choose("cpu", "bfloat16"), "auto")),
        "python": platform.python_version(),
        "torch": version("torch"),
        "ray": version("ray"),
        "outcrop": version("outcrop"),
    }


def save(out: Path, figures: Sequence[Any], **settings: Any) -> None:
    """A results file: where it comes from, how it was measured, and the figures (dataclasses)."""
    content = {"environment": environment(), **settings, "figures": [asdict(figure) for figure in figures]}
    out.write_text(json.dumps(content, indent=1) + "\n")


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
