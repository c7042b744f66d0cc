"""What a decode step costs in Python beside the model, and how that grows: with sequences, with context, with replicas.

    python -m benchmarks.growth

A model of no cost: the scheduler forms a step, its batch is built, its tokens are committed; for replicas, a part of
each layer and group finds its replica. Medians.
"""

import statistics
import time
from collections.abc import Callable

import typer

from benchmarks.report import table

LAYERS, GROUPS = 40, 16
BLOCK = 16


def decode_step(num_sequences: int, context: int) -> Callable[[], None]:
    """A step of sequences that have so many tokens each."""
    from actors.engine.batch_builder import build_batch
    from actors.engine.kv_cache import BlockAllocator
    from actors.engine.scheduler import Scheduler
    from actors.engine.sequence import Sequence
    from actors.staging import DIRECT
    from cluster.messages.requests import GenerationRequest, SamplingParams

    allocator = BlockAllocator(num_sequences * (context // BLOCK + 64), BLOCK, False)
    scheduler = Scheduler(
        allocator, max_num_batched_tokens=num_sequences * context, max_num_seqs=num_sequences, max_model_len=1 << 20
    )
    params = SamplingParams(max_tokens=1 << 20, temperature=0.0)
    for number in range(num_sequences):
        scheduler.add(Sequence.of(GenerationRequest(str(number), "", tuple(range(context)), params)))

    def step() -> None:
        chunks = scheduler.schedule()
        build_batch(chunks, BLOCK, DIRECT)
        for chunk in chunks:
            scheduler.commit(chunk)
            chunk.sequence.token_ids.append(0)

    step()
    return step


def choices(num_replicas: int) -> Callable[[], None]:
    """The replica of each part of a step, with so many replicas in a group."""
    import torch

    from actors.dispatch.parts import Part
    from actors.dispatch.remote import RemoteDispatcher
    from actors.lanes.unix_client import UnixLane
    from cluster.expert_map import ExpertMap, ReplicaAddress
    from cluster.metrics import Metrics

    dispatcher = RemoteDispatcher(UnixLane(), Metrics())
    replicas = tuple(ReplicaAddress(f"g{g}-r{r}", g, ()) for g in range(GROUPS) for r in range(num_replicas))
    dispatcher.set_map(ExpertMap(1, GROUPS, (tuple((g,) for g in range(GROUPS)),), replicas))
    nothing = torch.empty(0)
    parts = [Part(0, group, None, nothing, nothing, nothing, 1) for group in range(GROUPS)]

    def step() -> None:
        for _ in range(LAYERS):
            for part in parts:
                dispatcher._choose(part)

    return step


def milliseconds(step: Callable[[], None], repeat: int) -> float:
    taken = []
    for _ in range(repeat):
        started = time.perf_counter()
        step()
        taken.append(time.perf_counter() - started)
    return 1000 * statistics.median(taken)


def main(repeat: int = 20) -> None:
    """Print milliseconds of a step."""
    rows = [
        ("sequences, 128 tokens each", str(number), milliseconds(decode_step(number, 128), repeat))
        for number in (1, 16, 64, 256)
    ]
    rows += [
        ("tokens of each of 64 sequences", str(context), milliseconds(decode_step(64, context), repeat))
        for context in (128, 2048, 8192)
    ]
    rows += [("tokens of one sequence", "131072", milliseconds(decode_step(1, 131072), repeat))]
    rows += [
        (f"replicas of each of {GROUPS} groups, {LAYERS} layers", str(n), milliseconds(choices(n), repeat))
        for n in (1, 16, 256)
    ]
    table(("grows", "to", "ms a step"), [(what, to, f"{ms:.2f}") for what, to, ms in rows])


if __name__ == "__main__":
    typer.run(main)
