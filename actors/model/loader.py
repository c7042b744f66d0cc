"""From a checkpoint to tensors in place: reads only the slices an actor needs, straight into their final memory.

A file is mapped while one layer is copied out of it and unmapped after, so the pages that were read do not add up to a
second copy of the weights. Progress is told in bytes as stored, so that all actors' sums can be compared with
CheckpointInfo.

Shapes: V vocabulary, D hidden, F expert hidden, E experts.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from actors.experts.store import ACTIVATIONS, ExpertStore, LayerExperts
from actors.model.front_half import FrontHalf, FrontWeights
from actors.model.front_layers import LayerWeights
from actors.model.layers import AnyLinear, Linear, in_place, packed_if_possible
from cluster.models.checkpoint import CheckpointInfo, check_checkpoint, layer_shapes
from cluster.models.granite_moe import GraniteMoeConfig

Progress = Callable[[int], None]
# Rows copied at a time, in bytes: progress moves, and mapped pages stay few even in a large embedding.
COPY_BYTES = 64 << 20


class TensorReader:
    """Copies tensors of a checkpoint, by our keys, into memory of the right device and type."""

    def __init__(self, info: CheckpointInfo, device: torch.device, dtype: torch.dtype, progress: Progress) -> None:
        self.info = info
        self.device = device
        self.dtype = dtype
        self.progress = progress

    def read(self, key: str) -> Tensor:
        out = self.empty(*self.info.tensors[key].shape)
        self.read_into(out, key)
        return out

    def read_stacked(self, *keys: str) -> Tensor:
        """Tensors one below the other, as one."""
        shapes = [self.info.tensors[key].shape for key in keys]
        out = self.empty(sum(shape[0] for shape in shapes), *shapes[0][1:])
        start = 0
        for key, shape in zip(keys, shapes, strict=True):
            self.read_into(out[start : start + shape[0]], key)
            start += shape[0]
        return out

    def read_into(self, out: Tensor, key: str, first: int = 0) -> None:
        """Rows [first, first + len(out)) of a tensor."""
        info = self.info.tensors[key]
        row_bytes = info.num_bytes // info.shape[0]
        step = max(1, COPY_BYTES // row_bytes)
        for start in range(0, out.shape[0], step):
            part = out[start : start + step]
            with safe_open(info.file, framework="pt") as file:
                part.copy_(file.get_slice(info.name)[first + start : first + start + part.shape[0]])
            self.progress(part.shape[0] * row_bytes)

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, device=self.device, dtype=self.dtype)


def load_front(
    model_dir: Path, config: GraniteMoeConfig, device: torch.device, dtype: torch.dtype, progress: Progress
) -> FrontHalf:
    """Everything but the experts. Raises ModelError."""
    reader = TensorReader(check_checkpoint(model_dir, config), device, dtype, progress)
    embed_VD = reader.read("embed")
    # A tied head is packed only where nothing else is fast: it is in memory twice then.
    head = in_place(Linear(embed_VD)) if config.tie_word_embeddings else packed_if_possible(Linear(reader.read("head")))
    layers = tuple(_front_layer(reader, config, layer) for layer in range(config.num_hidden_layers))
    return FrontHalf(config, FrontWeights(embed_VD, layers, reader.read("norm"), head))


def _front_layer(reader: TensorReader, config: GraniteMoeConfig, layer: int) -> LayerWeights:
    def linear(*names: str) -> AnyLinear:
        keys = [f"layers.{layer}.{name}" for name in names]
        bias = reader.read_stacked(*(f"{key}_bias" for key in keys)) if config.attention_bias else None
        return packed_if_possible(Linear(reader.read_stacked(*keys), bias))

    return LayerWeights(
        attention_norm_D=reader.read(f"layers.{layer}.attention_norm"),
        qkv=linear("q", "k", "v"),
        out=linear("o"),
        moe_norm_D=reader.read(f"layers.{layer}.moe_norm"),
        router=in_place(Linear(reader.read(f"layers.{layer}.router"))),
    )


def load_experts(
    model_dir: Path,
    config: GraniteMoeConfig,
    experts: Sequence[Sequence[int]],
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
) -> ExpertStore:
    """The experts with the given global ids (ascending), layer by layer. Raises ModelError."""
    reader = TensorReader(check_checkpoint(model_dir, config), device, dtype, progress)
    assert len(experts) == config.num_hidden_layers
    activation = ACTIVATIONS[config.hidden_act]
    # Packed one by one, so that only one layer is ever there twice.
    layers = tuple(
        read_layer_experts(reader, config, layer, tuple(ids)).packed(activation) for layer, ids in enumerate(experts)
    )
    return ExpertStore(config, layers, device)


def read_layer_experts(
    reader: TensorReader, config: GraniteMoeConfig, layer: int, ids: tuple[int, ...]
) -> LayerExperts:
    shapes = layer_shapes(config)

    def read(name: str) -> Tensor:
        out = reader.empty(len(ids), *shapes[name][1:])
        for row, first, length in contiguous_runs(ids):
            reader.read_into(out[row : row + length], f"layers.{layer}.{name}", first)
        return out

    return LayerExperts(ids, read("gate_up"), read("down"))


def contiguous_runs(ids: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(position in ids, first id, length) of each run of consecutive ids: 3 4 5 9 -> (0, 3, 3), (3, 9, 1)."""
    starts = [at for at, expert in enumerate(ids) if at == 0 or expert != ids[at - 1] + 1]
    for start, end in pairwise([*starts, len(ids)]):
        yield start, ids[start], end - start
