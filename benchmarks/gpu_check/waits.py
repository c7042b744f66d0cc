"""How often the host waits for the device in a decode step, and how much is launched in one."""

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from actors.compute import Compute
from actors.engine.engine import Engine
from actors.staging import Pinned
from benchmarks.gpu_check.check import Check, Trial
from benchmarks.gpu_check.models import SMALL, local, make_engine, prompts, remote
from cluster.messages.requests import GenerationRequest, SamplingParams

LAYERS, NUM_STEPS = 4, 8
# Of a front, and beside its layers in a step: expert counts and tokens.
PER_LAYER, PER_STEP, PER_MESSAGE = 2, 2, 1
# By reading the code it is about 60 with a local store.
LAUNCHES_PER_LAYER = 100
# How torch begins to warn of a wait.
SYNCHRONIZED = "called a synchronizing"


class Counting(Pinned):
    """The staging of a GPU, and on a CPU the same without pinned memory; counts its downloads. Torch does not tell of
    these waits, which are for events.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.num_downloads = 0

    def download(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        self.num_downloads += 1
        return super().download(*tensors)


@contextmanager
def other_waits(is_on_gpu: bool) -> Iterator[Counter[str]]:
    """By place in the code, the waits that torch warns of."""
    seen: Counter[str] = Counter()
    if not is_on_gpu:
        yield seen
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield seen
        finally:
            torch.cuda.set_sync_debug_mode("default")
    seen.update(f"{Path(w.filename).name}:{w.lineno}" for w in caught if SYNCHRONIZED in str(w.message))


def decoding(engine: Engine, number: int, length: int = 40) -> None:
    """Have `number` sequences at decode: their prompts are read."""
    for index, prompt in enumerate(prompts(number, length)):
        params = SamplingParams(max_tokens=10**6, temperature=0.0)
        engine.add(GenerationRequest(f"decode-{index}", "", prompt, params))
    while any(sequence.num_uncomputed > 1 for sequence in engine.sequences.values()):
        step(engine)


def step(engine: Engine) -> None:
    for output in engine.step():
        if output.error:
            raise RuntimeError(output.error)


def front(trial: Trial) -> None:
    checkpoint, compute = trial.checkpoint(SMALL, LAYERS), Compute.choose(trial.device.type, "bfloat16")
    if not trial.is_on_gpu:  # native layers have no staging of their own
        compute = Compute(trial.device, torch.float32)
    staging, of_replicas = Counting(trial.device), list[Counting]()

    def counting(device: torch.device) -> Counting:
        of_replicas.append(Counting(device))
        return of_replicas[-1]

    dispatcher, lane = remote(checkpoint, compute, compute, 2, staging, counting)
    engine = make_engine(checkpoint, compute, dispatcher, staging=staging)
    decoding(engine, 8)
    staging.num_downloads, lane.num_sent, before = 0, 0, sum(each.num_downloads for each in of_replicas)
    with other_waits(trial.is_on_gpu) as others:
        for _ in range(NUM_STEPS):
            step(engine)
    in_replicas = sum(each.num_downloads for each in of_replicas) - before
    _judge(trial, staging.num_downloads, in_replicas, lane.num_sent, others)


def _judge(trial: Trial, in_front: int, in_replicas: int, num_messages: int, others: Counter[str]) -> None:
    downloads = f"{in_front / NUM_STEPS:g} a step in the front, {in_replicas / num_messages:g} a message in replicas"
    trial.figures |= {"layers": LAYERS, "downloads": downloads}
    if trial.is_on_gpu:
        places = {place: round(count / NUM_STEPS, 1) for place, count in others.most_common(8)}
        trial.figures["other waits a step"] = places or "none"
    most = LAYERS * PER_LAYER + PER_STEP + PER_MESSAGE * num_messages / NUM_STEPS
    found = (in_front + in_replicas + others.total()) / NUM_STEPS
    trial.expect(found <= most, f"{found:g} waits a step, at most {most:g} are expected")
    trial.expect(in_replicas <= PER_MESSAGE * num_messages, f"{in_replicas} downloads for {num_messages} messages")


def launches(trial: Trial) -> None:
    """Of an engine with a local store: no message is packed in between."""
    checkpoint, compute = trial.checkpoint(SMALL, LAYERS), Compute.choose(trial.device.type, "bfloat16")
    engine = make_engine(checkpoint, compute, local(checkpoint, compute))
    decoding(engine, 8)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if trial.is_on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        step(engine)
        trial.synchronize()
    counts = Counter({event.key: event.count for event in profile.key_averages()})
    trial.figures["operators of torch a step"] = sum(n for name, n in counts.items() if name.startswith("aten::"))
    if trial.is_on_gpu:
        num = sum(n for name, n in counts.items() if name.startswith(("cudaLaunchKernel", "cuLaunchKernel")))
        trial.figures["launches a step"] = num
        trial.figures["layers"] = LAYERS
        trial.expect(num > 0, "the profiler has seen no launch: is CUPTI there?")
        trial.expect(num <= LAYERS * LAUNCHES_PER_LAYER, f"{num / LAYERS:.0f} launches a layer")


CHECKS = (
    Check("waits", "the host waits at most twice a layer and twice a step, a replica once a message", front),
    Check("launches", f"at most {LAUNCHES_PER_LAYER} launches a layer", launches),
)
