"""Turns scheduled chunks into the tensors of one forward pass."""

import numpy as np
import torch
from torch import Tensor

from actors.engine.scheduler import Chunk
from actors.model.batch import Embeds, Span, StepBatch
from actors.staging import Staging
from cluster.messages.requests import PromptEmbeds


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
        _embeds_of(chunks),
    )
    return batch.uploaded(staging)


def _embeds_of(chunks: list[Chunk]) -> Embeds | None:
    """What stands in place of the embeddings of tokens."""
    rows: list[int] = []
    parts: list[Tensor] = []
    start = 0
    for chunk in chunks:
        sequence, first = chunk.sequence, chunk.sequence.num_computed
        last = min(first + chunk.length, sequence.num_prompt)
        if (given := sequence.request.prompt_embeds) and first < last:
            rows += range(start, start + last - first)
            parts.append(_as_tensor(given)[first:last].float())
        start += chunk.length
    return Embeds(torch.tensor(rows), torch.cat(parts)) if rows else None


def _as_tensor(given: PromptEmbeds) -> Tensor:
    return torch.frombuffer(given.data, dtype=getattr(torch, given.dtype)).view(given.shape)


def batch_for_nobody(length: int, block: int, block_size: int, staging: Staging) -> StepBatch:
    """The first tokens of a sequence that has one KV block; logits are wanted of the last."""
    assert length <= block_size
    positions, table = torch.arange(length), torch.tensor([[block]], dtype=torch.int32)
    tokens, slots, rows = torch.zeros_like(positions), block * block_size + positions, positions[-1:]
    return StepBatch(tokens, positions, slots, table, rows, (Span(0, length, length, 0, 1),)).uploaded(staging)
