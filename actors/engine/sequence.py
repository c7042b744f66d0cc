"""One sequence in a front: its tokens, its KV blocks, and what has been computed. Knows no tensors."""

import time
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from actors.dispatch.step import Step
from actors.engine.kv_cache import block_hash
from cluster.messages.requests import FinishReason, GenerationRequest, Timing, TokenLogprob

if TYPE_CHECKING:
    from actors.engine.adjustments import Adjustments
    from actors.engine.constraint import Constraint
    from actors.engine.pooling import Pooled


def no_blocks() -> "array[int]":
    return array("i")


@dataclass(slots=True, eq=False)
class Sequence:
    """`num_computed` tokens have their K and V in `blocks`. The rest of `token_ids` is still to be computed."""

    request: GenerationRequest
    token_ids: list[int]
    blocks: "array[int]" = field(default_factory=no_blocks)  # while it runs; as an array, which a batch copies at once
    hashes: list[bytes] = field(default_factory=list)
    num_computed: int = 0
    num_cached: int | None = None  # prompt tokens found in the prefix cache, at the first admission
    num_published: int = 0
    num_found: int = 0  # blocks of it, while it waits, that have been looked up in the prefix cache and were there
    found_at_try: int = 0  # the same when there was last no room for it
    retry_at: int = 0  # not before so many blocks have been given back in all, or more are found, can there be room
    num_routed: int = 0  # tokens whose experts have been reported
    prompt_logprobs: list[TokenLogprob | None] | None = None
    finish_reason: FinishReason | None = None
    arrived: float = field(default_factory=time.monotonic)
    started: float | None = None
    reported: float | None = None  # when the last Timing was taken
    steps: list[Step] = field(default_factory=list)  # those since then
    adjustments: "Adjustments | None" = None  # what the sampler keeps between steps
    constraint: "Constraint | None" = None  # the grammar that the output keeps to
    pooled: "Pooled | None" = None  # the prompt's hidden states, where they are what is asked for

    @classmethod
    def of(cls, request: GenerationRequest, constraint: "Constraint | None" = None) -> "Sequence":
        scores: list[TokenLogprob | None] | None = None if request.params.prompt_logprobs is None else [None]
        tokens = [*request.prompt_token_ids, *request.output_token_ids]
        return cls(request, tokens, prompt_logprobs=scores, constraint=constraint)

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def num_uncomputed(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def wants_prompt_logprobs(self) -> bool:
        """True while log-probabilities of prompt tokens are missing."""
        return self.prompt_logprobs is not None and len(self.prompt_logprobs) < self.num_prompt

    @property
    def needs_every_row(self) -> bool:
        """True while the hidden state of each prompt position is needed: none may come from the prefix cache."""
        return self.wants_prompt_logprobs or self.request.params.pooling == "mean"

    @property
    def is_shareable(self) -> bool:
        """Whether its tokens say what its keys and values are."""
        return self.request.prompt_embeds is None

    def hash_of(self, index: int, block_size: int) -> bytes:
        """Hash of a full block of tokens, and of all before it; computed once and kept."""
        for each in range(len(self.hashes), index + 1):
            previous = self.hashes[-1] if self.hashes else b""
            self.hashes.append(block_hash(previous, self.token_ids[each * block_size : (each + 1) * block_size]))
        return self.hashes[index]

    def num_logits(self, length: int) -> int:
        """Of how many of the next `length` tokens, counted from the last, the logits are wanted.

        The logits of position p tell the token at p + 1: prompt scores need every position before the last prompt
        token, sampling needs the last token, a mean needs all.
        """
        if self.request.params.pooling == "mean":
            return length
        if self.wants_prompt_logprobs:
            assert self.prompt_logprobs is not None
            known = len(self.prompt_logprobs) - 1 - self.num_computed
            return max(0, length - max(0, known))
        return int(self.num_computed + length == len(self.token_ids))

    def take_timing(self) -> Timing:
        """What has been spent since the last time, or since the first step."""
        assert self.started is not None
        now, since, steps = time.monotonic(), self.reported or self.started, self.steps
        queued = self.started - self.arrived if self.reported is None else None
        self.reported, self.steps = now, []
        return Timing(
            now - since,
            len(steps),
            sum(step.wait_seconds for step in steps),
            sum(step.compute_seconds for step in steps),
            sum(step.num_failovers for step in steps),
            sum(step.num_local_tokens for step in steps),
            queued,
        )

    def reset(self) -> None:
        """Forget what was computed, after the blocks were given back (preemption by recompute)."""
        self.blocks = no_blocks()
        self.num_computed = self.num_published = 0
        self.pooled = None
