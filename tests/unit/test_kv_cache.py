"""The block allocator keeps its books whatever happens, and finds equal prefixes."""

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from actors.engine.kv_cache import BlockAllocator, block_hash

BLOCK = 2


def hashes_of(tokens: list[int]) -> list[bytes]:
    found: list[bytes] = []
    for start in range(0, len(tokens) - len(tokens) % BLOCK, BLOCK):
        found.append(block_hash(found[-1] if found else b"", tokens[start : start + BLOCK]))
    return found


def test_a_block_s_hash_depends_on_everything_before_it() -> None:
    assert hashes_of([1, 2, 3, 4]) == hashes_of([1, 2, 3, 4, 9])
    assert hashes_of([1, 2, 3, 4])[1] != hashes_of([9, 2, 3, 4])[1]
    assert hashes_of([1, 2])[0] != hashes_of([12, 0])[0]


def test_the_least_recently_used_block_is_taken_first_and_the_end_of_a_prefix_before_its_beginning() -> None:
    allocator = BlockAllocator(4, BLOCK)
    keys = hashes_of([1, 2, 3, 4, 5, 6, 7, 8])
    blocks = allocator.allocate(4)
    for block, key in zip(blocks, keys, strict=True):
        allocator.publish(block, key)
    allocator.free(blocks)
    assert allocator.allocate(1) == [blocks[3]]
    assert allocator.match_prefix(keys) == blocks[:3]


def test_without_prefix_caching_nothing_is_found() -> None:
    allocator = BlockAllocator(4, BLOCK, enable_prefix_caching=False)
    (block,) = allocator.allocate(1)
    allocator.publish(block, b"key")
    assert allocator.match_prefix([b"key"]) == []


def test_memory_touched_before_is_used_again_first() -> None:
    allocator = BlockAllocator(100, BLOCK, enable_prefix_caching=False)
    for _ in range(10):
        allocator.free(allocator.allocate(3))
    assert set(allocator.allocate(3)) == {0, 1, 2}


class AllocatorMachine(RuleBasedStateMachine):
    """Sequences come with equal prefixes, publish, share and go, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = BlockAllocator(12, BLOCK)
        self.tables: list[list[int]] = []

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=10))
    def arrive(self, tokens: list[int]) -> None:
        keys = hashes_of(tokens)
        table = self.allocator.match_prefix(keys)
        missing = -(-len(tokens) // BLOCK) - len(table)
        if not self.allocator.can_allocate(missing):
            self.allocator.free(table)
            return
        table += self.allocator.allocate(missing)
        for block, key in zip(table, keys, strict=False):
            self.allocator.publish(block, key)
        self.tables.append(table)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.allocator.free(self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1))))

    @invariant()
    def books_agree(self) -> None:
        self.allocator.check_integrity(self.tables)


TestAllocator = AllocatorMachine.TestCase
TestAllocator.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@given(st.lists(st.integers(0, 2**40), max_size=12))
@settings(deadline=None)
def test_matching_returns_exactly_what_was_published(tokens: list[int]) -> None:
    allocator = BlockAllocator(8, BLOCK)
    keys = hashes_of(tokens)
    blocks = allocator.allocate(len(keys))
    for block, key in zip(blocks, keys, strict=True):
        allocator.publish(block, key)
    assert allocator.match_prefix(keys) == blocks
    allocator.check_integrity([blocks, blocks])
