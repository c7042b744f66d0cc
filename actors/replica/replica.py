"""An expert replica without Ray: its experts, and answers to packed dispatches."""

import logging
import threading
import time
from collections.abc import Callable

import torch

from actors.experts.layer_experts import FusedExperts, LayerExperts
from actors.experts.store import ExpertStore, NotHeld
from actors.kernels.serving import NativeServing, Shape
from actors.lanes import wire
from actors.lanes.step_id import StepId
from cluster.actor_id import slot_of
from cluster.messages.actors import ReplicaSpec
from cluster.metrics import BY_NAME, Metrics

logger = logging.getLogger(__name__)

# As many as a step has at most, unless max_num_batched_tokens says otherwise.
WARM_UP_TOKENS = 512

# (layer, global ids) -> those experts, read from the checkpoint
ReadExperts = Callable[[int, tuple[int, ...]], LayerExperts]


class Replica:
    """Lanes may call it from their own threads: one computation runs at a time."""

    def __init__(self, spec: ReplicaSpec, store: ExpertStore, read: ReadExperts, metrics: Metrics) -> None:
        self.spec = spec
        self.store = store
        self.read = read
        self.metrics = metrics
        # Restarted replicas count on under the name of their slot: labels stay few.
        self._slot = slot_of(spec.actor_id)
        self.serving = _serving(store)
        self._num_tokens = 0
        self._published = self.serving.computed() if self.serving else None
        self._publishing = threading.Lock()
        self._last_steps: dict[int, StepId] = {}  # by front, those that the log has a line of
        self._computing = threading.Lock()
        self._began: float | None = None

    @property
    def num_tokens(self) -> int:
        return self._num_tokens + (self.serving.computed().tokens if self.serving else 0)

    @property
    def stuck_seconds(self) -> float:
        """Since the computation that is running has begun; 0 while none is. For any thread."""
        began = [self._began, self.serving.began_at if self.serving else None]
        return max((time.monotonic() - at for at in began if at is not None), default=0.0)

    def publish_counters(self) -> None:
        """Bring the metrics up to date with what was computed without Python."""
        if self.serving is None or self._published is None:
            return
        with self._publishing:  # reports may be asked for side by side
            before, now = self._published, self.serving.computed()
            self._published = now
        counts = [b - a for a, b in zip(before.at_most, now.at_most, strict=True)]
        group = str(self.spec.group)
        self.metrics.observe_all("expert_compute_seconds", counts, now.seconds - before.seconds, group=group)
        self.metrics.inc("expert_tokens_total", now.tokens - before.tokens, group=group, replica=self._slot)

    def set_experts(self, layer: int, ids: tuple[int, ...]) -> int:
        """Hold exactly these experts of a layer; returns how many had to be read. Computation goes on meanwhile:
        only the exchange of the finished layer waits for its turn.
        """
        here = self.store.layers[layer]
        missing = tuple(expert for expert in ids if expert not in here.ids)
        layer_experts = here.regrouped(ids, self.read(layer, missing))
        with self._computing:
            self.store.replace(layer, layer_experts)
            if self.serving and isinstance(layer_experts, FusedExperts):
                self.serving.set_layer(layer, ids, layer_experts.experts)
        return len(missing)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compute a token and a large message, for nobody: what is loaded at its first use, such as the kernels of a
        GPU, takes longer than a front waits for an answer.
        """
        spec, compute = self.store.spec, self.store.compute
        layer, held = next(((layer, ids) for layer, ids in enumerate(self.store.held) if ids), (0, ()))
        for num_tokens in (1, WARM_UP_TOKENS) if held else ():
            x_TD, gates_TK = (
                torch.zeros(num_tokens, width, dtype=compute.dtype) for width in (spec.hidden_size, spec.top_k)
            )
            ids_TK = torch.tensor(held)[torch.arange(gates_TK.numel()) % len(held)].view(gates_TK.shape)
            self.store.staging.download(self.store.run(layer, x_TD, ids_TK, gates_TK))

    def answer(self, frame: wire.Buffer) -> bytes:
        """Answer a packed dispatch with a packed partial, or with the reason why not."""
        try:
            dispatch = wire.unpack_dispatch(frame)
        except wire.WireError as error:
            logger.error("no dispatch: %s", error)
            return wire.pack_refusal(wire.FAILED, f"WireError: {error}")
        return self.answer_batch([dispatch])[0]

    def answer_batch(self, dispatches: list[wire.Dispatch]) -> list[bytes]:
        """Packed answers to dispatches of one layer, computed together if they fit together."""
        if len({(d.x_TD.shape[1], d.ids_TK.shape[1], d.x_TD.dtype) for d in dispatches}) > 1:
            return [self.answer_batch([dispatch])[0] for dispatch in dispatches]
        if logger.isEnabledFor(logging.DEBUG):
            self._tell_steps(dispatches)
        try:
            return self._compute(dispatches)
        except Exception as error:
            if len(dispatches) > 1:  # only the one that is wrong may fail
                return [self.answer_batch([dispatch])[0] for dispatch in dispatches]
            extra = {"step": str(dispatches[0].step)}
            if isinstance(error, NotHeld):  # the map has moved on: part of every rebalance
                logger.info("refused: %s", error, extra=extra)
                return [wire.pack_refusal(wire.NOT_HELD, str(error), error.expert)]
            text = f"{type(error).__name__}: {error}"
            logger.error("dispatch of layer %d failed: %s", dispatches[0].layer, text, extra=extra)
            return [wire.pack_refusal(wire.FAILED, text)]

    def _tell_steps(self, dispatches: list[wire.Dispatch]) -> None:
        """A line at the first message of each step."""
        for dispatch in dispatches:
            step = dispatch.step
            if self._last_steps.get(step.front) != step:
                self._last_steps[step.front] = step
                logger.debug("step begins at layer %d", dispatch.layer, extra={"step": str(step)})

    def _check(self, dispatch: wire.Dispatch) -> None:
        """Kernels believe that sizes are the model's, and read past the end of what is smaller. Raises ValueError."""
        spec = self.store.spec
        if dispatch.layer >= len(self.store.layers):
            raise ValueError(f"layer {dispatch.layer} of {len(self.store.layers)}")
        for what, sent, ours in (
            ("hidden size", dispatch.x_TD.shape[1], spec.hidden_size),
            ("top-k", dispatch.ids_TK.shape[1], spec.top_k),
            ("type", dispatch.x_TD.dtype, self.store.compute.dtype),
        ):
            if sent != ours:
                raise ValueError(f"{what} {sent} was sent to a model of {what} {ours}")

    @torch.inference_mode()
    def _compute(self, dispatches: list[wire.Dispatch]) -> list[bytes]:
        self._check(dispatches[0])
        layer = dispatches[0].layer
        with self._computing:
            started = self._began = time.monotonic()
            try:
                partial_TD = self._run(layer, dispatches)
            finally:
                self._began = None
            seconds = time.monotonic() - started
            self._count(len(partial_TD), seconds)
            # Before others compute: what a download has returned does not hold for ever.
            return [wire.pack_partial(part, seconds) for part in partial_TD.split([len(d.x_TD) for d in dispatches])]

    def _run(self, layer: int, dispatches: list[wire.Dispatch]) -> torch.Tensor:
        """On the host: a GPU has computed only once its result is here, and the clock stops behind that."""
        x_TD, ids_TK, gates_TK = (
            _cat(parts) for parts in zip(*((d.x_TD, d.ids_TK, d.gates_TK) for d in dispatches), strict=True)
        )
        (sum_TD,) = self.store.staging.download(self.store.run(layer, x_TD, ids_TK.long(), gates_TK))
        return sum_TD

    def _count(self, num_tokens: int, seconds: float) -> None:
        group = str(self.spec.group)
        self._num_tokens += num_tokens
        self.metrics.inc("expert_tokens_total", num_tokens, group=group, replica=self._slot)
        self.metrics.observe("expert_compute_seconds", seconds, group=group)


def _serving(store: ExpertStore) -> NativeServing | None:
    """The loop that computes these experts without Python, or None if there is none for their kind. With log level
    debug each step has a line, which is Python's.
    """
    layers = [layer for layer in store.layers if isinstance(layer, FusedExperts)]
    if len(layers) < len(store.layers) or logger.isEnabledFor(logging.DEBUG):
        return None
    shape = Shape(len(layers), store.spec.num_experts, store.spec.hidden_size, store.spec.top_k)
    serving = NativeServing(shape, layers[0].experts, BY_NAME["expert_compute_seconds"].buckets)
    for number, layer in enumerate(layers):
        serving.set_layer(number, layer.ids, layer.experts)
    return serving


def _cat(parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
