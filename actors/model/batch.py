"""One step's tokens, packed without padding. The scheduler decides them, the front half computes them.

Shape legend of the model code: T tokens of the step, N some of them, S sequences, R rows that need logits, D hidden,
F expert hidden, E experts, K top-k, L layers, H query heads, G key/value heads, C head dimension, V vocabulary, B KV
blocks.
"""

from dataclasses import dataclass

from torch import Tensor

from actors.staging import Staging


@dataclass(frozen=True, slots=True)
class Span:
    """The new tokens of one sequence: rows [start, start + length) of the step; `context` counts all its tokens
    that are in the KV cache once these are written (earlier ones and the new ones). Logits are wanted of the last
    `num_logits` of them, which are the rows from `first_logit` on among all of the step whose logits are wanted.
    """

    start: int
    length: int
    context: int
    first_logit: int = 0
    num_logits: int = 0

    @property
    def logits(self) -> slice:
        """Its rows of R."""
        return slice(self.first_logit, self.first_logit + self.num_logits)


@dataclass(frozen=True, slots=True)
class Embeds:
    """Embeddings of some rows of a step in place of those of their tokens: rows_N int64, values_ND float32."""

    rows_N: Tensor
    values_ND: Tensor


@dataclass(frozen=True, slots=True)
class StepBatch:
    """Input of one forward pass. Sequences with a single new token come first.

    token_ids_T, positions_T, slots_T: int64; a slot is block * block_size + offset, where the token's K and V go.
    blocks_SB: int32, the KV blocks of each sequence in order, padded with 0.
    rows_R: int64, the rows of the step whose logits are wanted, ascending.
    """

    token_ids_T: Tensor
    positions_T: Tensor
    slots_T: Tensor
    blocks_SB: Tensor
    rows_R: Tensor
    spans: tuple[Span, ...]
    embeds: Embeds | None = None

    @property
    def num_tokens(self) -> int:
        return self.token_ids_T.shape[0]

    @property
    def num_single(self) -> int:
        """Sequences with one new token; they are the first rows of the step."""
        return sum(span.length == 1 for span in self.spans)

    def uploaded(self, staging: Staging) -> "StepBatch":
        """The same on the device."""
        tensors = self.token_ids_T, self.positions_T, self.slots_T, self.blocks_SB, self.rows_R
        token_ids_T, positions_T, slots_T, blocks_SB, rows_R = staging.upload(*tensors)
        embeds = self.embeds and Embeds(*staging.upload(self.embeds.rows_N, self.embeds.values_ND))
        return StepBatch(token_ids_T, positions_T, slots_T, blocks_SB, rows_R, self.spans, embeds)
