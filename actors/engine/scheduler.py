"""Which tokens the next step computes. Knows sequences and block numbers, no tensors.

Continuous batching with a budget of tokens: first one token for every sequence that is being continued, then pieces of
prompts. The shortest prompts are read first, so that none waits behind longer ones; but the oldest gets half of what
is left for prompts, so that each is read in the end. A sequence gets the blocks of all its tokens when it is admitted,
so only the growth of running sequences can run out of blocks; then the youngest is preempted and later computed again.
"""

from array import array
from collections import Counter, deque
from dataclasses import dataclass

from actors.engine.kv_cache import BlockAllocator
from actors.engine.sequence import Sequence, no_blocks
from actors.engine.step_budget import StepBudget
from cluster.messages.requests import FinishReason

# So many blocks of waiting sequences are looked up in the prefix cache in one step. The next step looks further.
MAX_LOOKUPS = 512


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
        self, allocator: BlockAllocator, *, max_num_batched_tokens: int | None, max_num_seqs: int, max_model_len: int
    ) -> None:
        self.allocator = allocator
        self.budget = StepBudget(max_num_batched_tokens)
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission: the last is the youngest
        self.num_freed = 0  # blocks that sequences have given back
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
        chunks = self._continue_running(self.budget.most_decodes(len(self.running)))
        chunks += self._read_prompts(self.budget.prompt_tokens(len(chunks)))
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
        while sequence.blocks:  # as long as it runs
            if len(sequence.blocks) >= self._num_blocks(len(sequence.token_ids)):
                return True
            if self.allocator.can_allocate(1):
                sequence.blocks.extend(self.allocator.allocate(1))
            else:
                self._preempt(self.running[-1])
        return False

    def _preempt(self, sequence: Sequence) -> None:
        self._remove(sequence)
        sequence.reset()
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _remove(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.allocator.free(sequence.blocks)
        self.num_freed += len(sequence.blocks)

    def _read_prompts(self, budget: int) -> list[Chunk]:
        prompts = self._prompts() if budget > 0 else []
        self._look_up(prompts)
        turns = [(sequence, -(-budget // 2)) for sequence in prompts[:1]]
        turns += [(sequence, budget) for sequence in sorted(prompts, key=self._num_unread)]
        shares: Counter[Sequence] = Counter()
        left, has_room = budget, True
        for sequence, most in turns:
            if left > 0 and has_room:  # those that come later need no less room
                has_room = self._admit(sequence)
            if sequence.blocks:
                share = min(most, left, sequence.num_uncomputed - shares[sequence])
                shares[sequence] += share
                left -= share
        chunks = (Chunk(sequence, _piece(share, sequence.num_uncomputed)) for sequence, share in shares.items())
        return [c for c in chunks if c.length > 1 or (c.length and (c.completes or budget <= 2))]

    def _prompts(self) -> list[Sequence]:
        """What is being read or could be, the oldest first. While that one finds no room, nobody else takes any."""
        reading = [sequence for sequence in self.running if sequence.num_uncomputed > 1]
        prompts = sorted((*reading, *self.waiting), key=lambda sequence: sequence.arrived)
        self._look_up(prompts[:1])
        return prompts if prompts and self._admit(prompts[0]) else [one for one in prompts if one.blocks]

    def _num_unread(self, sequence: Sequence) -> int:
        """What a waiting sequence would find in the prefix cache, it need not read."""
        if sequence.blocks:
            return sequence.num_uncomputed
        return len(sequence.token_ids) - sequence.num_found * self.allocator.block_size

    def _look_up(self, prompts: list[Sequence]) -> None:
        """Bring up to date how many blocks of waiting sequences can be found; what is not looked up is not hashed."""
        size, has, left = self.allocator.block_size, self.allocator.has, MAX_LOOKUPS
        for sequence in prompts:
            if sequence.blocks:
                continue
            while sequence.num_found and not has(sequence.hash_of(sequence.num_found - 1, size)):
                sequence.num_found -= 1
            most = self._num_cacheable(sequence)
            while left > 0 and sequence.num_found < most and has(sequence.hash_of(sequence.num_found, size)):
                sequence.num_found += 1
                left -= 1
            left -= 1

    def _admit(self, sequence: Sequence) -> bool:
        """Let the sequence run, if it does not: give it blocks for all its tokens, reusing computed prefixes. False if
        there are too few, or as many sequences as may run.
        """
        if sequence.blocks:
            return True
        if len(self.running) >= self.max_num_seqs or not self._may_fit(sequence):
            return False
        size = self.allocator.block_size
        hashes = (sequence.hash_of(index, size) for index in range(self._num_cacheable(sequence)))
        matched = self.allocator.match_prefix(hashes)
        missing = self._num_blocks(len(sequence.token_ids)) - len(matched)
        lacking = missing - self.allocator.num_available
        if lacking > 0:
            self.allocator.free(matched)
            sequence.num_found = sequence.found_at_try = len(matched)
            sequence.retry_at = self.num_freed + lacking
            return False
        self.waiting.remove(sequence)
        self.running.append(sequence)
        sequence.blocks = array("i", matched + self.allocator.allocate(missing))
        sequence.num_computed = len(matched) * size
        sequence.num_published = len(matched)
        if sequence.num_cached is None:
            self._count_cached(sequence)
        return True

    def _may_fit(self, sequence: Sequence) -> bool:
        """False while fewer blocks have been given back, or found for it, than it lacked when it was last tried: to
        match its whole prefix in every step would cost those that run the more, the longer it is.
        """
        newly_found = max(0, sequence.num_found - sequence.found_at_try)
        return self.num_freed + newly_found >= sequence.retry_at

    def _count_cached(self, sequence: Sequence) -> None:
        """Once for each request: what a preempted or replayed sequence finds, it has mostly computed itself."""
        sequence.num_cached = 0 if sequence.request.is_replay else sequence.num_computed
        if not sequence.request.is_replay:
            self.num_prefix_queries += len(sequence.token_ids)
            self.num_prefix_hits += sequence.num_cached

    def _num_cacheable(self, sequence: Sequence) -> int:
        """Blocks that may be taken from the prefix cache."""
        if not self.allocator.enable_prefix_caching or sequence.needs_every_row or not sequence.is_shareable:
            return 0
        # At least one token is always computed: the next one is sampled from its logits.
        return (len(sequence.token_ids) - 1) // self.allocator.block_size

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.allocator.block_size)

    def commit(self, chunk: Chunk) -> None:
        """The chunk's K and V are in the cache now: full blocks become findable."""
        sequence = chunk.sequence
        sequence.num_computed += chunk.length
        if not self.allocator.enable_prefix_caching or not sequence.is_shareable:
            return
        size = self.allocator.block_size
        num_full = sequence.num_computed // size
        for index in range(sequence.num_published, num_full):
            self.allocator.publish(sequence.blocks[index], sequence.hash_of(index, size))
        sequence.num_published = num_full

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """Take the sequence out, wherever it is, and give its blocks back."""
        if sequence.blocks:
            self._remove(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.blocks = no_blocks()
        sequence.finish_reason = reason

    def clear(self) -> None:
        """Forget every sequence, and what the cache holds: nothing that may be wrong is kept."""
        self.running, self.waiting = [], deque()
        old = self.allocator
        self.allocator = BlockAllocator(old.num_blocks, old.block_size, old.enable_prefix_caching)

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


def _piece(length: int, unread: int) -> int:
    """Where a prompt is cut, no piece of a single token is left if that can be helped: it would be computed as a
    continuation is, which rounds differently in bfloat16, and equal prompts should agree however they are cut.
    """
    return length - 1 if unread - length == 1 and length > 2 else length
