"""Decode steps as CUDA graphs: the front's half of each layer is captured once for some numbers of sequences, and then
replayed. A layer's launches, about twenty, cost a CPU more time than a GPU needs for their work; a replay is one.

Between the halves of two layers lies a dispatch, which no graph can hold: so each layer has a graph of its own. A step
of fewer sequences than were captured is padded with sequences that belong to nobody and live in a spare KV block.

Not yet run on a GPU: tests replay on a CPU what was captured there, operation by operation.

Shapes: N sequences that were captured for, S sequences of the step, B KV blocks of a sequence, D hidden, K top-k.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.attention import current_flash_attention_impl

from actors.compute import Compute
from actors.model.attention import AttentionPlan, VarlenPlan
from actors.model.batch import Span, StepBatch
from actors.model.front_layers import LayerSteps, Routed
from actors.model.paged_kv import PagedKV
from cluster.errors import ModelError
from cluster.models.spec import ModelSpec

# Larger steps are slow for the work that they are, not for its launches.
LARGEST = 512

T = TypeVar("T")
Replay = Callable[[], object]
# (what to compute) -> its result, and what computes it anew from the same inputs in the same memory.
Capture = Callable[[Callable[[], T]], tuple[T, Replay]]
MakeSteps = Callable[[StepBatch, PagedKV, AttentionPlan], LayerSteps]


def cuda_capture() -> Capture[Tensor]:
    """All graphs share memory for what is between their inputs and results: they never run side by side. The stream is
    their own, as scratch memory of cuBLAS belongs to a stream, and is let go with the first graph of it that ends.
    """
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def capture(compute: Callable[[], Tensor]) -> tuple[Tensor, Replay]:
        graph = torch.cuda.CUDAGraph()
        # Other threads of the process may go on to allocate and to copy. A capture that fails leaves its stream behind
        # as the current one.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
        ):
            result = compute()
        return result, graph.replay

    return capture


@dataclass(frozen=True, slots=True)
class Captures:
    """What is captured: `make_steps` for a model on a device. `kv` has one block more than sequences may use: the last
    one belongs to the padding.
    """

    spec: ModelSpec
    compute: Compute
    make_steps: MakeSteps
    kv: PagedKV
    max_model_len: int
    capture: Capture[Tensor]


class DecodeGraphs:
    def __init__(self, captures: Captures) -> None:
        self._captures = captures
        self._by_size: list[_Captured] = []
        self.num_replayed = 0  # steps

    @torch.inference_mode()
    def capture(self, max_num_seqs: int) -> None:
        """For powers of two, so that there is one for `max_num_seqs` up to LARGEST. The largest come first: the others
        fit into their memory. Raises ModelError.
        """
        sizes = [2**power for power in range((min(max_num_seqs, LARGEST) - 1).bit_length() + 1)]
        try:
            captured = [_Captured(self._captures, size) for size in reversed(sizes)]
        except RuntimeError as error:
            # Torch raises another error when it ends a capture that has failed.
            first = str(error.__context__ or error).partition("\n")[0]
            raise ModelError(f"decode steps can't be captured, set cuda_graphs to false ({first})") from error
        self._by_size = captured[::-1]

    def steps(self, batch: StepBatch) -> "GraphSteps | None":
        """The step's way through the layers, or None for a step that is no decode step, or has too many sequences."""
        if batch.num_single < len(batch.spans):
            return None
        captured = next((each for each in self._by_size if each.size >= batch.num_tokens), None)
        if captured is None:
            return None
        self.num_replayed += 1
        captured.load(batch)
        return GraphSteps(captured, batch.num_tokens)


class _Captured:
    """The graphs of all layers for `size` sequences, with the memory that they read from and write to."""

    def __init__(self, captures: Captures, size: int) -> None:
        spec, kv, device, dtype = captures.spec, captures.kv, captures.compute.device, captures.compute.dtype
        self.size = size
        spare = kv.num_blocks - 1
        # Token, position and slot of each sequence.
        self._padding_3 = torch.tensor([[0], [0], [spare * kv.block_size]], device=device)
        self._inputs_3N = self._padding_3.repeat(1, size)
        width = -(-captures.max_model_len // kv.block_size)
        self._blocks_NB = torch.full((size, width), spare, dtype=torch.int32, device=device)
        self.combined_ND = torch.zeros(size, spec.hidden_size, dtype=dtype, device=device)
        self.h_ND = torch.zeros_like(self.combined_ND)
        self.gates_NK = torch.zeros(size, spec.top_k, dtype=dtype, device=device)
        self.x_ND = torch.zeros_like(self.combined_ND)
        self.layers = spec.layers
        self.ids_NK: list[Tensor] = []  # by layer: a step reads them in the end; anything where it has no experts
        self.replays: list[Replay] = []
        self._capture(captures)

    def _capture(self, captures: Captures) -> None:
        tokens_N, positions_N, slots_N = self._inputs_3N
        spans = tuple(Span(row, 1, captures.max_model_len) for row in range(self.size))
        batch = StepBatch(tokens_N, positions_N, slots_N, self._blocks_NB, positions_N[:0], spans)
        steps: LayerSteps | None = None

        def layer(number: int) -> Tensor:
            nonlocal steps
            if steps is None:  # the first graph has the embedding, and what all layers share
                steps = captures.make_steps(batch, captures.kv, DecodePlan(batch, captures.max_model_len))
            h_ND, ids_NK, gates_NK = steps.attend_and_route(number, self.combined_ND if number else None)
            self.h_ND.copy_(h_ND)
            self.x_ND.copy_(steps.x_TD)
            if ids_NK is None or gates_NK is None:
                return self.h_ND
            self.gates_NK.copy_(gates_NK)
            return ids_NK

        for number in range(captures.spec.num_layers):  # kernels are loaded at their first use, which can't be captured
            layer(number)
        steps = None
        for number in range(captures.spec.num_layers):
            ids_NK, replay = captures.capture(partial(layer, number))
            self.ids_NK.append(ids_NK)
            self.replays.append(replay)
        self.chosen = [self.ids_NK[number] for number in captures.spec.expert_layers]

    def load(self, batch: StepBatch) -> None:
        num, width = batch.blocks_SB.shape
        self._inputs_3N[:, :num] = torch.stack((batch.token_ids_T, batch.positions_T, batch.slots_T))
        self._blocks_NB[:num, :width] = batch.blocks_SB
        if num < self.size:  # or the sequences of a larger step would write to blocks that are others' by now
            self._inputs_3N[:, num:] = self._padding_3


class GraphSteps(LayerSteps):
    """One step's way through captured layers. What a layer returns holds until the next one, experts until the next
    step.
    """

    def __init__(self, captured: _Captured, num_sequences: int) -> None:
        self._captured = captured
        self._num = num_sequences
        self.num_layers = len(captured.layers)
        self.x_TD = captured.x_ND[:num_sequences]

    def chosen(self, place: int) -> Tensor:
        return self._captured.chosen[place][: self._num]

    def all_chosen(self) -> Tensor:
        return torch.stack(self._captured.chosen, dim=1)[: self._num]

    def attend_and_route(self, number: int, combined_TD: Tensor | None) -> Routed:
        captured, num = self._captured, self._num
        if combined_TD is not None:
            captured.combined_ND[:num] = combined_TD
        captured.replays[number]()
        if not captured.layers[number].has_experts:
            return captured.h_ND[:num], None, None
        return captured.h_ND[:num], captured.ids_NK[number][:num], captured.gates_NK[:num]


class DecodePlan(VarlenPlan):
    """Sequences with one new token each, whose contexts are read from their positions on the device. `max_k` is an
    upper bound: with one split of the keys it changes nothing but the size of what version 2 rounds up to.
    """

    def __init__(self, batch: StepBatch, max_k: int) -> None:
        num_sequences = batch.num_tokens
        self.cu_seq_q = torch.arange(num_sequences + 1, dtype=torch.int32, device=batch.positions_T.device)
        self.seqused_k = (batch.positions_T + 1).to(torch.int32)
        self.cu_seq_k = None
        if current_flash_attention_impl() is None:
            self.cu_seq_k = torch.zeros_like(self.cu_seq_q)
            torch.cumsum(self.seqused_k, 0, dtype=torch.int32, out=self.cu_seq_k[1:])
        self.max_q, self.max_k = 1, max_k
        self.block_table = batch.blocks_SB
