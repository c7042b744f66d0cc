"""Turns scheduled chunks into the tensors of one forward pass."""

import numpy as np
import torch

from actors.engine.scheduler import Chunk
from actors.model.batch import Span, StepBatch
from actors.staging import Staging


def build_batch(chunks: list[Chunk], block_size: int, staging: Staging) -> StepBatch:
    """Pack chunks in their order (single tokens first); built on the host, uploaded in one go."""
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    rows: list[int] = []
    spans: list[Span] = []
    for chunk in chunks:
        sequence, start = chunk.sequence, len(tokens)
        first, last = sequence.num_computed, sequence.num_computed + chunk.length
        tokens += sequence.token_ids[first:last]
        positions += range(first, last)
        slots += [sequence.blocks[p // block_size] * block_size + p % block_size for p in range(first, last)]
        first_logit, wanted = len(rows), sequence.num_logits(chunk.length)
        rows += range(start + chunk.length - wanted, start + chunk.length)
        spans.append(Span(start, chunk.length, last, first_logit, wanted))
    # An array, because lists padded to the longest would cost as much as if all were that long.
    width = max(len(chunk.sequence.blocks) for chunk in chunks)
    blocks = np.zeros((len(chunks), width), dtype=np.int32)
    for row, chunk in zip(blocks, chunks, strict=True):
        row[: len(chunk.sequence.blocks)] = np.frombuffer(chunk.sequence.blocks, np.int32)
    batch = StepBatch(
        torch.tensor(tokens),
        torch.tensor(positions),
        torch.tensor(slots),
        torch.from_numpy(blocks),
        torch.tensor(rows, dtype=torch.int64),
        tuple(spans),
    )
    return batch.uploaded(staging)


def batch_for_nobody(length: int, block: int, block_size: int, staging: Staging) -> StepBatch:
    """The first tokens of a sequence that has one KV block; logits are wanted of the last."""
    assert length <= block_size
    positions, table = torch.arange(length), torch.tensor([[block]], dtype=torch.int32)
    tokens, slots, rows = torch.zeros_like(positions), block * block_size + positions, positions[-1:]
    return StepBatch(tokens, positions, slots, table, rows, (Span(0, length, length, 0, 1),)).uploaded(staging)
