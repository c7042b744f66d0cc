"""What a decode step takes, by part and by number of sequences, and what of it is slower than was estimated.

On a GPU the model is of the shape 1b-a400m with few layers, on a CPU it is the small one: that half only shows that
the measurement runs.
"""

import statistics
import time
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from actors.compute import Compute
from actors.dispatch.dispatcher import Dispatcher
from actors.engine.engine import Engine
from benchmarks.gpu_check.check import Check, Trial
from benchmarks.gpu_check.models import SMALL, local, make_engine, remote
from benchmarks.gpu_check.waits import decoding, step
from cluster.models.checkpoint import Checkpoint

MIB = 2**20
LAYERS_OF_MODEL, PROMPT = 24, 128
# Of a decode step of 24 layers with few sequences, in milliseconds. Estimates: the GPU itself works for 2 to 4.
SLOW_MS = 8.0
NEXT_STEPS = {
    "attend and route": "launches: set cuda_graphs, if the check `decode` is faster with it",
    "dispatch": "the read-back of a layer: look at the check `waits`, then at packing on the host",
    "experts": "the products: look at the way that the check `grouped products` names",
    "combine": "messages: put fewer groups on this machine, or use lane=local where the model fits one GPU",
    "head": "the product with the vocabulary: compare with the time that reading its matrix once takes",
    "rest": "scheduling and sampling on the host: look at `other waits a step` of the check `waits`",
}


class Timed(Dispatcher):
    """Adds up where a step's time goes, with a wait behind each part: their sum is more than a step takes unwatched."""

    def __init__(self, inner: Dispatcher, trial: Trial) -> None:
        super().__init__()
        self.inner, self.trial = inner, trial
        self.seconds: dict[str, float] = defaultdict(float)
        self._last = time.perf_counter()

    def mark(self, part: str) -> None:
        """What has passed since the last mark was this part."""
        self.trial.synchronize()
        now = time.perf_counter()
        self.seconds[part] += now - self._last
        self._last = now

    def dispatch(self, layer: int, x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor) -> Any:
        self.mark("attend and route")
        self.inner.step = self.step
        pending = self.inner.dispatch(layer, x_TD, ids_TK, gates_TK)
        self.mark("dispatch")
        return pending

    def combine(self, pending: Any) -> Tensor:
        sum_TD = self.inner.combine(pending)
        self.mark("combine")
        return sum_TD


def parts(engine: Engine, trial: Trial) -> dict[str, float]:
    """Seconds a step, by part. `experts` is what replicas, or the local store, say that they took."""
    timed = Timed(engine.dispatcher, trial)
    logits, is_remote = engine.model.logits, not hasattr(engine.dispatcher, "store")
    experts = 0.0

    def marked(hidden_RD: Tensor) -> Tensor:
        timed.mark("rest")
        out = logits(hidden_RD)
        timed.mark("head")
        return out

    engine.dispatcher, engine.model.logits = timed, marked  # type: ignore[method-assign]
    timed.mark("before")
    for _ in range(trial.sizes.steps):
        step(engine)
        timed.mark("rest")
        experts += timed.step.compute_seconds
    engine.dispatcher, engine.model.logits = timed.inner, logits  # type: ignore[method-assign]
    del timed.seconds["before"]
    if is_remote:
        timed.seconds["combine"] -= experts  # in this process, replicas compute while the front waits for them
        timed.seconds["experts"] = experts
    else:  # without a message, to dispatch is to compute
        timed.seconds["experts"] = timed.seconds.pop("dispatch")
    return {part: seconds / trial.sizes.steps for part, seconds in timed.seconds.items()}


def step_seconds(engine: Engine, trial: Trial) -> float:
    """Median; a step ends with its tokens on the host."""
    taken = []
    for _ in range(trial.sizes.steps):
        started = time.perf_counter()
        step(engine)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def _model(trial: Trial) -> Checkpoint:
    return trial.checkpoint(trial.sizes.gpu_shape if trial.is_on_gpu else SMALL, trial.sizes.gpu_layers)


def _engine(trial: Trial, dispatcher: Dispatcher, compute: Compute, number: int, graphs: bool = False) -> Engine:
    most = 256 * -(-(PROMPT + 7 * number + 4 * trial.sizes.steps) // 256)
    engine = make_engine(
        _model(trial), compute, dispatcher, num_tokens=most * max(2, number), budget=2048, graphs=graphs
    )
    if graphs:
        engine.warm_up()
    decoding(engine, number, PROMPT)
    step(engine)
    return engine


def by_batch(trial: Trial) -> None:
    checkpoint, compute = _model(trial), Compute.choose(trial.device.type, "bfloat16")
    dispatcher = local(checkpoint, compute)
    trial.figures["layers"] = checkpoint.spec.num_layers
    for how in ("", ", graphs") if trial.is_on_gpu else ("",):
        for number in trial.sizes.batches:
            seconds = step_seconds(_engine(trial, dispatcher, compute, number, graphs=bool(how)), trial)
            what = f"{1e3 * seconds:.2f} ms a step, {number / seconds:.0f} tokens/s"
            trial.figures[f"{number} sequences{how}"] = what


def by_part(trial: Trial) -> None:
    """Where it is slow is told, and is no failure."""
    checkpoint, compute, number = _model(trial), Compute.choose(trial.device.type, "bfloat16"), trial.sizes.batches[0]
    layers = checkpoint.spec.num_layers
    ways = {"local": local(checkpoint, compute), "two replicas": remote(checkpoint, compute, compute, 2)[0]}
    for way, dispatcher in ways.items():
        engine = _engine(trial, dispatcher, compute, number)
        seconds, found = step_seconds(engine, trial), parts(engine, trial)
        shown = ", ".join(f"{part} {1e6 * found[part] / layers:.0f}" for part in found if part not in ("head", "rest"))
        trial.figures[f"{way}, microseconds a layer"] = shown
        trial.figures[f"{way}, a step"] = f"head {1e6 * found['head']:.0f}, rest {1e6 * found['rest']:.0f} microseconds"
        of_layers = sum(found.values()) - found["head"] - found["rest"]
        whole = 1e3 * seconds * (1 + of_layers / sum(found.values()) * (LAYERS_OF_MODEL / layers - 1))
        trial.figures[f"{way}, {LAYERS_OF_MODEL} layers"] = f"{whole:.1f} ms a step"
        if trial.is_on_gpu and whole > SLOW_MS:
            weights = {
                part: s * (1 if part in ("head", "rest") else LAYERS_OF_MODEL / layers) for part, s in found.items()
            }
            slowest = max(weights, key=lambda part: weights[part])
            advice = f"{way}: {whole:.1f} ms a step is slow, most of it in {slowest}. {NEXT_STEPS[slowest]}"
            trial.figures["next step"] = "; ".join(filter(None, (trial.figures.get("next step"), advice)))


def memory(trial: Trial) -> None:
    """Weights and cache are what was asked for; the rest of the peak is scratch memory of a step of 2048 tokens."""
    checkpoint, compute = _model(trial), Compute.choose(trial.device.type, "bfloat16")
    if trial.is_on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if trial.is_on_gpu else 0
    engine = make_engine(checkpoint, compute, local(checkpoint, compute), num_tokens=8192, budget=2048)
    expected = checkpoint.total_bytes + engine.kv.num_bytes
    decoding(engine, 4, 512)
    step(engine)
    trial.figures["weights and cache"] = f"{expected / MIB:.0f} MiB"
    if trial.is_on_gpu:
        loaded, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
        # A front's budget leaves a tenth of its GPU to scratch memory.
        most = 0.1 * torch.cuda.get_device_properties().total_memory
        trial.expect(peak - loaded <= most, f"scratch memory of a step takes {(peak - loaded) / MIB:.0f} MiB")
        trial.figures |= {"allocated": f"{loaded / MIB:.0f} MiB", "peak": f"{peak / MIB:.0f} MiB"}
        trial.expect(
            loaded <= 1.1 * expected + 64 * MIB, f"{loaded / MIB:.0f} MiB are held, {expected / MIB:.0f} expected"
        )


CHECKS = (
    Check("memory of a front", "weights and cache take what they should; the peak of a step", memory),
    Check("decode", "a step by number of sequences, experts in the front", by_batch),
    Check(
        "parts of a step", f"where the time goes; slow is more than {SLOW_MS:g} ms in {LAYERS_OF_MODEL} layers", by_part
    ),
)
