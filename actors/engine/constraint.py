"""The grammar of one sequence: which tokens may come next.

Its state is a function of the grammar and of the tokens emitted so far. They are taken in when the next mask is wanted,
so it does not matter which front has emitted them, nor how often they were computed. Shapes: R rows, V vocabulary,
W words of 32 tokens each.
"""

from collections.abc import Callable
from collections.abc import Sequence as Tokens
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch
from llguidance import LLMatcher
from torch import Tensor

from actors.staging import Staging
from cluster.models.grammars import GrammarError, check

if TYPE_CHECKING:
    from actors.engine.sequence import Sequence


class Constraint:
    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._num_taken = 0
        self.mask_W = torch.zeros(-(-vocab_size // 32), dtype=torch.int32)

    def follow(self, emitted: Tokens[int]) -> None:
        """Make `mask_W` that of the token behind these. Raises GrammarError: the grammar goes beyond its limits."""
        new = list(emitted[self._num_taken :])
        if new:
            self._matcher.consume_tokens(new)
            self._num_taken = len(emitted)
        self._matcher.unsafe_compute_mask_ptr(self.mask_W.data_ptr(), self.mask_W.nbytes)
        check(self._matcher)


class Masks:
    """Computes the masks of a step beside the model, in a thread: llguidance lets go of the interpreter's lock."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "masks")

    def begin(self, sequences: "list[Sequence]") -> "Callable[[], dict[Sequence, GrammarError]]":
        """Bring their constraints up to their last tokens. What is returned waits for that, and says whose grammars
        have gone beyond their limits.
        """
        return self._thread.submit(_follow, sequences).result if sequences else dict


def _follow(sequences: "list[Sequence]") -> "dict[Sequence, GrammarError]":
    failed = {}
    for sequence in sequences:
        assert sequence.constraint is not None
        try:
            sequence.constraint.follow(sequence.token_ids[sequence.num_prompt :])
        except GrammarError as error:
            failed[sequence] = error
    return failed


def masked(logits_RV: Tensor, masks: dict[int, Tensor], staging: Staging) -> Tensor:
    """The logits with tokens that `masks` (row -> mask_W) do not allow made impossible. One upload."""
    # numpy: to unpack the bits of 32 rows takes torch 30 times as long as all the rest.
    is_banned_RV = np.zeros(logits_RV.shape, dtype=np.uint8)
    for row, mask_W in masks.items():
        octets = np.invert(mask_W.numpy().view(np.uint8))
        is_banned_RV[row] = np.unpackbits(octets, bitorder="little")[: logits_RV.shape[1]]
    (banned_RV,) = staging.upload(torch.from_numpy(is_banned_RV).view(torch.bool))
    return logits_RV.masked_fill(banned_RV, -torch.inf)
