"""Which KV blocks belong to whom. Knows block numbers and token ids, no tensors.

A full block is identified by the hash of its tokens and of everything before it, so an equal prompt prefix finds the
blocks that an earlier sequence computed. A block that nobody uses keeps its content until it is needed for something
else; among those the least recently used is taken first.
"""

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from itertools import takewhile


class BlockAllocator:
    """Reference-counted blocks with a prefix index.

    A block is in use (count > 0), or cached (count 0, content findable by hash), or free. `num_available` counts the
    last two: a cached block may be taken any time.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks={num_blocks}: the KV cache needs at least one block")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._free = list(range(num_blocks - 1, -1, -1))  # used as a stack: memory never touched stays untouched
        self._count = [0] * num_blocks
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_available(self) -> int:
        return len(self._free) + len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_available

    def can_allocate(self, n: int) -> bool:
        return n <= self.num_available

    def allocate(self, n: int) -> list[int]:
        """Take n blocks, each with count 1. Raises MemoryError, taking none, if there are not enough."""
        if not self.can_allocate(n):
            raise MemoryError(f"{n} KV blocks wanted, {self.num_available} available")
        return [self._take() for _ in range(n)]

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            del self._block_of[self._hash_of.pop(block)]
        self._count[block] = 1
        return block

    def free(self, blocks: Iterable[int]) -> None:
        """Give up one reference to each block. The last block of a prefix becomes the first to be reused."""
        for block in reversed(list(blocks)):
            assert self._count[block] > 0, f"KV block {block} was freed twice"
            self._count[block] -= 1
            if self._count[block]:
                continue
            if block in self._hash_of:
                self._cached[block] = None
            else:
                self._free.append(block)

    def match_prefix(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks that hold the longest run of `hashes` from the start, each with one more reference."""
        found = [self._block_of[key] for key in takewhile(self.has, hashes)]
        for block in found:
            self._cached.pop(block, None)
            self._count[block] += 1
        return found

    def has(self, key: bytes) -> bool:
        """Whether a block with this hash can be found."""
        return key in self._block_of

    def publish(self, block: int, key: bytes) -> None:
        """Make a full, computed block findable. The first block with a given content wins."""
        if self.enable_prefix_caching and key not in self._block_of and block not in self._hash_of:
            self._block_of[key] = block
            self._hash_of[block] = key

    def check_integrity(self, tables: Iterable[Sequence[int]] = ()) -> None:
        """Raise AssertionError unless every block is in one state and counts agree with the sequences' tables."""
        used = Counter(block for table in tables for block in table)
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & cached, "a block is free and cached"
        for block, count in enumerate(self._count):
            assert count == used[block], f"block {block}: count {count}, used by {used[block]} sequences"
            assert (count == 0) == (block in free or block in cached), f"block {block} is lost"
            assert not (block in free and block in self._hash_of), f"free block {block} is still findable"
        assert cached <= set(self._hash_of), "a cached block can't be found"
        assert self._block_of == {key: block for block, key in self._hash_of.items()}, (
            "the prefix index is inconsistent"
        )


def block_hash(previous: bytes, tokens: Sequence[int]) -> bytes:
    """Hash of a full block, chained to the block before it. 256 bits of blake2b: collisions can't be crafted."""
    return hashlib.blake2b(array("q", tokens).tobytes(), key=previous, digest_size=32).digest()
