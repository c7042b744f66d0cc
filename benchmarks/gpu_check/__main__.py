"""Proves the path of GPUs on a machine that has one: `python -m benchmarks.gpu_check [--out FILE]`. See docs/gpu.md.

Every check has a half for the CPU, which runs everywhere, and one for the first GPU that torch sees.
"""

import faulthandler
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.gpu_check import attention, engines, experts, machine, reference, sampling, speed, waits
from benchmarks.gpu_check.check import Check, Row, Sizes, Trial, run_half
from benchmarks.gpu_check.models import checkpoints_in
from benchmarks.report import environment, table

CHECKS = (
    *machine.CHECKS,
    *attention.CHECKS,
    *experts.CHECKS,
    *sampling.CHECKS,
    *reference.CHECKS,
    *engines.CHECKS,
    *waits.CHECKS,
    *speed.CHECKS,
)
# After so long something hangs: the traceback of every thread says what.
MOST_SECONDS = 900


def main(out: Annotated[Path | None, typer.Option(help="Write results and figures as JSON.")] = None) -> None:
    """Check the path of GPUs; the exit status is 1 if a check has failed."""
    rows = run_all(Sizes(), out)
    raise typer.Exit(int(any(row.result == "failed" for row in rows)))


def run_all(sizes: Sizes, out: Path | None = None) -> list[Row]:
    """Run every check and show the table. What is done is in the file even if a later check ends the process."""
    rows: list[Row] = []
    here, broken_by = {"environment": environment(), "gpus": machine.gpus()}, ""
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = checkpoints_in(Path(directory))
        for check in CHECKS:
            rows.append(run_half(check, Trial(torch.device("cpu"), sizes, checkpoint)))
            rows.append(_on_gpu(check, sizes, checkpoint, broken_by))
            if rows[-1].result == "failed" and not broken_by and not _gpu_computes():
                broken_by = check.name
            print(*(f"{row.name} on the {row.on}: {row.result}" for row in rows[-2:]), sep="\n", flush=True)
            if out:
                out.write_text(json.dumps(here | {"checks": [asdict(row) for row in rows]}, indent=1) + "\n")
    _show(rows)
    return rows


def _on_gpu(check: Check, sizes: Sizes, checkpoint: Any, broken_by: str) -> Row:
    if broken_by:
        return Row(check.name, check.shows, "GPU", "not run", f"the GPU computes nothing since the check {broken_by!r}")
    if not torch.cuda.is_available():
        driver = machine.unusable_driver()
        if driver and check in machine.CHECKS[:1]:
            return Row(check.name, check.shows, "GPU", "failed", driver)
        return Row(check.name, check.shows, "GPU", "not run", "no GPU that torch can use" if driver else "no GPU")
    return run_half(check, Trial(torch.device("cuda"), sizes, checkpoint))


def _gpu_computes() -> bool:
    """An illegal access ends all that a process can do with its GPU."""
    try:
        return not torch.cuda.is_available() or bool(torch.ones(8, device="cuda").sum() == 8)
    except RuntimeError:
        return False


def _show(rows: list[Row]) -> None:
    def told(row: Row) -> str:
        figures = "; ".join(f"{name}: {value}" for name, value in row.figures.items())
        return "; ".join(text for text in (row.why, figures) if text)

    table(
        ("check", "on", "result", "what was found"),
        [(f"{row.name}: {row.shows}" if row.on == "CPU" else "", row.on, row.result, told(row) or "-") for row in rows],
    )
    for row in rows:
        if "next step" in row.figures:
            print(f"{row.name}: {row.figures['next step']}")


if __name__ == "__main__":
    faulthandler.enable()
    faulthandler.dump_traceback_later(MOST_SECONDS, exit=True)
    typer.run(main)
