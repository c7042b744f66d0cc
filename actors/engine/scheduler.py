"""Which tokens the next step computes. Knows sequences and block numbers, no tensors.

Continuous batching with a token budget: first one token for every sequence that is being continued, then prompt
chunks, first come first served. A sequence gets the blocks of all its tokens when it is admitted, so only the growth
of running sequences can run out of blocks; then the youngest is preempted and later computed again.
"""

import time
from collections import deque
from dataclasses import dataclass

from actors.engine.kv_cache import BlockAllocator
from actors.engine.sequence import Sequence
from cluster.messages import FinishReason


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next `length` uncomputed tokens of a sequence."""

    sequence: Sequence
    length: int

    @property
    def completes(self) -> bool:
        """True if after this chunk every token is computed, so that a new one can be sampled."""
        return self.length == self.sequence.num_uncomputed


class Scheduler:
    def __init__(
        self, allocator: BlockAllocator, *, max_num_batched_tokens: int, max_num_seqs: int, max_model_len: int
    ) -> None:
        self.allocator = allocator
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission: the last is the youngest
        self.num_preemptions = 0
        self.num_prefix_queries = 0
        self.num_prefix_hits = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def schedule(self) -> list[Chunk]:
        """Form the next step; sequences with a single token come first. Empty only if there is no work."""
        chunks = self._continue_running(self.max_num_batched_tokens)
        budget = self.max_num_batched_tokens - sum(chunk.length for chunk in chunks)
        chunks += self._prefill_running(budget)
        budget = self.max_num_batched_tokens - sum(chunk.length for chunk in chunks)
        chunks += self._admit_waiting(budget)
        return sorted(chunks, key=lambda chunk: chunk.length > 1)

    def _continue_running(self, budget: int) -> list[Chunk]:
        chunks: list[Chunk] = []
        for sequence in tuple(self.running):
            if len(chunks) == budget:
                break
            if sequence.num_uncomputed == 1 and self._grow(sequence):
                chunks.append(Chunk(sequence, 1))
        return chunks

    def _grow(self, sequence: Sequence) -> bool:
        """Make room for the sequence's last token. False if the sequence was preempted, now or before."""
        while sequence in self.running:
            if len(sequence.blocks) >= self._num_blocks(len(sequence.token_ids)):
                return True
            if self.allocator.can_allocate(1):
                sequence.blocks += self.allocator.allocate(1)
            else:
                self._preempt(self.running[-1])
        return False

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.allocator.free(sequence.blocks)
        sequence.reset()
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _prefill_running(self, budget: int) -> list[Chunk]:
        chunks = []
        for sequence in self.running:
            if budget > 0 and sequence.num_uncomputed > 1:
                chunks.append(Chunk(sequence, min(budget, sequence.num_uncomputed)))
                budget -= chunks[-1].length
        return chunks

    def _admit_waiting(self, budget: int) -> list[Chunk]:
        chunks = []
        while budget > 0 and self.waiting and len(self.running) < self.max_num_seqs:
            sequence = self.waiting[0]
            if not self._admit(sequence):
                break
            self.waiting.popleft()
            self.running.append(sequence)
            chunks.append(Chunk(sequence, min(budget, sequence.num_uncomputed)))
            budget -= chunks[-1].length
        return chunks

    def _admit(self, sequence: Sequence) -> bool:
        """Give the sequence blocks for all its tokens, reusing computed prefixes. False if there are too few."""
        matched = self._match_prefix(sequence)
        missing = self._num_blocks(len(sequence.token_ids)) - len(matched)
        if not self.allocator.can_allocate(missing):
            self.allocator.free(matched)
            return False
        sequence.blocks = matched + self.allocator.allocate(missing)
        sequence.num_computed = sequence.num_cached = len(matched) * self.allocator.block_size
        sequence.num_published = len(matched)
        self.num_prefix_queries += len(sequence.token_ids)
        self.num_prefix_hits += sequence.num_cached
        sequence.started = sequence.started or time.monotonic()
        return True

    def _match_prefix(self, sequence: Sequence) -> list[int]:
        if not self.allocator.enable_prefix_caching or sequence.wants_prompt_logprobs:
            return []  # prompt scores need the hidden state of every prompt position
        # At least one token is always computed: the next one is sampled from its logits.
        return self.allocator.match_prefix(sequence.full_hashes(self.allocator.block_size, len(sequence.token_ids) - 1))

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.allocator.block_size)

    def commit(self, chunk: Chunk) -> None:
        """The chunk's K and V are in the cache now: full blocks become findable."""
        sequence = chunk.sequence
        sequence.num_computed += chunk.length
        if not self.allocator.enable_prefix_caching:
            return
        hashes = sequence.full_hashes(self.allocator.block_size, sequence.num_computed)
        for index in range(sequence.num_published, len(hashes)):
            self.allocator.publish(sequence.blocks[index], hashes[index])
        sequence.num_published = len(hashes)

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """Take the sequence out, wherever it is, and give its blocks back."""
        if sequence in self.running:
            self.running.remove(sequence)
            self.allocator.free(sequence.blocks)
        else:
            self.waiting.remove(sequence)
        sequence.blocks = []
        sequence.finish_reason = reason

    def check_integrity(self) -> None:
        """Raise AssertionError unless queues, blocks and counters agree."""
        assert len(self.running) <= self.max_num_seqs, "more sequences run than allowed"
        everyone = [*self.running, *self.waiting]
        ids = {s.request.request_id for s in everyone}
        assert len(ids) == len(everyone), "a request is scheduled twice"
        for sequence in self.waiting:
            assert not sequence.blocks, "a waiting sequence holds KV blocks"
            assert not sequence.num_computed, "a waiting sequence counts computed tokens"
        for sequence in self.running:
            room = len(sequence.blocks) * self.allocator.block_size
            assert sequence.num_computed < len(sequence.token_ids), "a running sequence has nothing to compute"
            assert sequence.num_computed <= room, "computed tokens lie outside the sequence's blocks"
        self.allocator.check_integrity(s.blocks for s in self.running)
