"""What a step takes beside arithmetic: an engine steps a model that is so small that arithmetic costs it next to
nothing.
"""

import time
from pathlib import Path

from actors.compute import Compute
from actors.dispatch.local import LocalDispatcher
from actors.engine.engine import Engine
from actors.engine.kv_cache import BlockAllocator
from actors.engine.scheduler import Scheduler
from actors.experts.loading import load_experts
from actors.model.loading import load_front
from actors.model.paged_kv import PagedKV
from actors.probe.stopwatch import undisturbed
from actors.weights import Weights
from cluster.messages.requests import GenerationRequest, SamplingParams
from cluster.metrics import Metrics
from cluster.models.checkpoint import Checkpoint

BATCHES = (1, 32)
CONTEXT, BLOCK_SIZE, STEPS = 16, 16, 200


def step_seconds(model_dir: Path, compute: Compute) -> dict[int, float]:
    """Seconds of a decode step, by the number of sequences, with the experts in the same process."""
    checkpoint = Checkpoint.open(model_dir)
    weights = Weights(checkpoint, compute)
    num_blocks = max(BATCHES) * (CONTEXT + STEPS + 16) // BLOCK_SIZE + max(BATCHES)
    scheduler = Scheduler(
        BlockAllocator(num_blocks, BLOCK_SIZE, False),
        max_num_batched_tokens=512,
        max_num_seqs=max(BATCHES),
        max_model_len=checkpoint.spec.max_context,
    )
    kv = PagedKV(checkpoint.spec, num_blocks, BLOCK_SIZE, compute)
    experts = LocalDispatcher(load_experts(weights, checkpoint.all_experts))
    engine = Engine(load_front(weights), kv, experts, scheduler, Metrics())
    return {batch: _decode(engine, batch) for batch in BATCHES}


def _decode(engine: Engine, batch: int) -> float:
    params = SamplingParams(max_tokens=STEPS + 8, temperature=0.0)
    for number in range(batch):
        prompt = tuple((7 * number + place) % 1000 + 2 for place in range(CONTEXT))
        engine.add(GenerationRequest(str(number), "", prompt, params))
    while any(sequence.num_output < 2 for sequence in engine.sequences.values()):
        engine.step()
    taken = []
    for _ in range(STEPS):
        started = time.perf_counter()
        engine.step()
        taken.append(time.perf_counter() - started)
    for request_id in tuple(engine.sequences):
        engine.abort(request_id)
    return undisturbed(taken)
