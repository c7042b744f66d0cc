"""Engines in this process, for tests: a checkpoint in, outputs out, integrity checked after every step."""

from pathlib import Path

from actors.compute import Compute
from actors.dispatch.dispatcher import Dispatcher
from actors.dispatch.local import LocalDispatcher
from actors.engine.engine import Engine
from actors.engine.kv_cache import BlockAllocator
from actors.engine.scheduler import Scheduler
from actors.experts.loading import load_experts
from actors.model.loading import load_front
from actors.model.paged_kv import PagedKV
from actors.weights import Weights
from cluster.messages.requests import GenerationRequest, RequestOutput, SamplingParams
from cluster.metrics import Metrics
from cluster.models.checkpoint import Checkpoint


def make_engine(
    model_dir: Path,
    *,
    dispatcher: Dispatcher | None = None,
    num_blocks: int = 64,
    block_size: int = 4,
    budget: int | None = 64,
    max_num_seqs: int = 8,
    prefix_caching: bool = True,
    dtype: str = "float32",
) -> Engine:
    checkpoint = Checkpoint.open(model_dir)
    weights = Weights(checkpoint, Compute.choose("cpu", dtype))
    dispatcher = dispatcher or LocalDispatcher(load_experts(weights, checkpoint.all_experts))
    scheduler = Scheduler(
        BlockAllocator(num_blocks, block_size, prefix_caching),
        max_num_batched_tokens=budget,
        max_num_seqs=max_num_seqs,
        max_model_len=checkpoint.spec.max_positions,
    )
    kv = PagedKV(checkpoint.spec, num_blocks, block_size, weights.compute)
    return Engine(load_front(weights), kv, dispatcher, scheduler, Metrics())


class Result:
    """What a client sees of one request."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.outputs: list[RequestOutput] = []

    @property
    def last(self) -> RequestOutput:
        return self.outputs[-1]


def run(engine: Engine, requests: dict[str, tuple[list[int], SamplingParams]], stagger: int = 0) -> dict[str, Result]:
    """Run requests to their end. With `stagger`, one more request arrives every so many steps."""
    arriving = list(requests.items())
    results = {name: Result() for name in requests}
    step = 0
    while arriving or engine.has_work:
        while arriving and (not stagger or step % stagger == 0):
            name, (prompt, params) = arriving.pop(0)
            engine.add(GenerationRequest(name, "test", tuple(prompt), params))
            if stagger:
                break
        for output in engine.step():
            assert output.error is None, output.error
            results[output.request_id].token_ids += output.token_ids
            results[output.request_id].outputs.append(output)
        engine.check_integrity()
        step += 1
    return results
