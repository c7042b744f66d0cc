"""Other engines on the same checkpoint and machine: decode at several batch sizes, and a prefill.

    make bench-peers    (sets up their virtual environments under checkpoints/peers first)
    python -m benchmarks.peers CHECKPOINT [--peers vllm,transformers,outcrop-local]

Each engine lives in a process of its own; they take turns (A B C A B C), so that what else the machine does hits all.
Decode is what further tokens cost: the time for 1 + steps tokens less the time for one. Ratios are medians of ratios
within a round.
"""

import json
import statistics
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.report import save, table

WORKER = Path(__file__).with_name("peer_worker.py")
OURS = "outcrop"
# Tokens of a prompt before decoding: few, since what they cost is subtracted, noise and all.
PROMPT = 8


@dataclass(frozen=True, slots=True)
class Figure:
    """`ratio`: our speed over this engine's, so above 1 where ours is faster."""

    case: str
    engine: str
    tokens_per_second: float
    ratio: float


class Worker:
    def __init__(self, engine: str, python: str, checkpoint: Path, dtype: str, stack: ExitStack) -> None:
        # -P: this folder has modules with names of others (kernels).
        command = [python, "-P", str(WORKER), engine, str(checkpoint), dtype]
        self._process = stack.enter_context(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
        self._engine = engine
        self._answer()  # it is ready

    def seconds(self, prompts: list[list[int]], tokens: int) -> float:
        assert self._process.stdin
        self._process.stdin.write(json.dumps({"prompts": prompts, "tokens": tokens}) + "\n")
        self._process.stdin.flush()
        return float(self._answer()["seconds"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._engine} ended with exit status {self._process.wait()}: see its messages above")
        answer: dict[str, Any] = json.loads(line)
        return answer


def prompts_of(batch: int, length: int) -> list[list[int]]:
    return [[(7 * number + 13 * j) % 4000 + 300 for j in range(length)] for number in range(batch)]


def decode(worker: Worker, batch: int, steps: int) -> float:
    """Tokens per second after the first token."""
    prompts = prompts_of(batch, PROMPT)
    first = worker.seconds(prompts, 1)
    return batch * steps / (worker.seconds(prompts, 1 + steps) - first)


def prefill(worker: Worker, length: int) -> float:
    return length / worker.seconds(prompts_of(1, length), 1)


def main(
    checkpoint: Path,
    peers: str = "vllm,transformers",
    venvs: Annotated[Path, typer.Option(help="Where the peers' virtual environments are.")] = Path("checkpoints/peers"),
    batches: str = "1,8,32",
    length: Annotated[int, typer.Option(help="Tokens of the prefill.")] = 512,
    steps: int = 16,
    rounds: int = 3,
    dtype: str = "bfloat16",
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Measure CHECKPOINT in this engine and in its peers."""
    cases = {f"decode {b}": (lambda w, b=b: decode(w, b, steps)) for b in map(int, filter(None, batches.split(",")))}
    cases |= {f"prefill {length}": lambda w: prefill(w, length)} if length else {}
    with ExitStack() as stack:
        workers = {OURS: Worker(OURS, sys.executable, checkpoint, dtype, stack)}
        for peer in filter(None, peers.split(",")):
            python = sys.executable if peer.startswith(OURS) else str(venvs / peer / "bin" / "python")
            workers[peer] = Worker(peer, python, checkpoint, dtype, stack)
        for worker in workers.values():
            worker.seconds(prompts_of(1, PROMPT), 2)
        figures = [figure for case, run in cases.items() for figure in measure(case, run, workers, rounds)]
    table(
        ("case", "engine", "tok/s", "ours / theirs"),
        [(f.case, f.engine, f"{f.tokens_per_second:.1f}", f"{f.ratio:.2f}") for f in figures],
    )
    if out:
        save(out, figures, dtype=dtype)


def measure(case: str, run: Any, workers: dict[str, Worker], rounds: int) -> list[Figure]:
    speeds: dict[str, list[float]] = {engine: [] for engine in workers}
    for _ in range(rounds):
        for engine, worker in workers.items():
            speeds[engine].append(run(worker))
    return [
        Figure(
            case,
            engine,
            statistics.median(theirs),
            statistics.median(o / t for o, t in zip(speeds[OURS], theirs, strict=True)),
        )
        for engine, theirs in speeds.items()
    ]


if __name__ == "__main__":
    typer.run(main)
