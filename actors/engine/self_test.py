"""Whether an engine can compute at all: before it serves, and after a step that has failed."""

import torch

from actors.dispatch.dispatcher import Dispatcher, DispatchError, NoExperts
from actors.engine.batch_builder import batch_for_nobody
from actors.engine.scheduler import Scheduler
from actors.model.front_half import FrontHalf
from actors.model.paged_kv import PagedKV

# After this many failed steps in a row a front is of no use, whatever its self-test says.
MAX_FAILED_STEPS = 5


class BrokenEngineError(RuntimeError):
    """This engine will not recover. Its sequences have not failed: another front can go on with them."""


class SelfTest:
    def __init__(self, model: FrontHalf, kv: PagedKV, scheduler: Scheduler) -> None:
        self._model = model
        self._kv = kv
        self._scheduler = scheduler
        self._num_failed = 0  # steps in a row

    def warm_up(self, dispatcher: Dispatcher) -> None:
        """Compute a piece of a prompt and a single token through every layer, for nobody: raises what a first request
        would run into, and has what is loaded at its first use loaded now.
        """
        for length in (self._kv.block_size, 1):
            self.compute(length, 0, dispatcher)

    def is_well(self) -> None:
        """A step has succeeded."""
        self._num_failed = 0

    def look(self, error: Exception) -> None:
        """After a failed step: see whether a token can be computed for nobody, without experts, which are not this
        front's to answer for. A GPU that is gone, for one, would fail every step, and draw requests by its low load.

        Raises BrokenEngineError.
        """
        if isinstance(error, DispatchError):
            return
        self._num_failed += 1
        try:
            if self._num_failed >= MAX_FAILED_STEPS:
                raise error
            allocator = self._scheduler.allocator  # another one since a failure has emptied the books
            if allocator.can_allocate(1):
                block = allocator.allocate(1)
                self.compute(1, block[0], NoExperts())
                allocator.free(block)
        except Exception as another:
            raise BrokenEngineError(f"{type(another).__name__}: {another}") from another

    @torch.inference_mode()
    def compute(self, length: int, block: int, dispatcher: Dispatcher) -> None:
        """Overwrites the start of a KV block."""
        batch = batch_for_nobody(length, block, self._kv.block_size, self._model.staging)
        hidden_RD, _ = self._model.forward(batch, self._kv, dispatcher)
        self._model.staging.download(self._model.logits(hidden_RD))
