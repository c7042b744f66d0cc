"""What the scheduler promises, on block numbers alone."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.engine.kv_cache import BlockAllocator
from actors.engine.scheduler import MAX_LOOKUPS, Chunk, Scheduler
from actors.engine.sequence import Sequence
from cluster.messages.requests import GenerationRequest, SamplingParams


def make(num_blocks: int = 16, block_size: int = 4, budget: int | None = 16, max_num_seqs: int = 4) -> Scheduler:
    allocator = BlockAllocator(num_blocks, block_size)
    return Scheduler(allocator, max_num_batched_tokens=budget, max_num_seqs=max_num_seqs, max_model_len=64)


def sequence(name: str, length: int, max_tokens: int = 8, first: int = 0) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens)
    return Sequence.of(GenerationRequest(name, "test", tuple(range(first, first + length)), params))


def step(scheduler: Scheduler) -> list[tuple[str, int]]:
    """Schedule, pretend to compute (the next token is always 7), finish what is done."""
    chunks = scheduler.schedule()
    for chunk in chunks:
        completes = chunk.completes
        scheduler.commit(chunk)
        if completes:
            chunk.sequence.token_ids.append(7)
            if chunk.sequence.num_output == chunk.sequence.request.params.max_tokens:
                scheduler.finish(chunk.sequence, "length")
    scheduler.check_integrity()
    return [(chunk.sequence.request.request_id, chunk.length) for chunk in chunks]


def test_decodes_come_first_and_prompts_fill_the_budget_in_chunks() -> None:
    scheduler = make(budget=10)
    scheduler.add(sequence("a", 3))
    assert step(scheduler) == [("a", 3)]
    scheduler.add(sequence("b", 25, first=100))
    assert step(scheduler) == [("a", 1), ("b", 9)]
    assert step(scheduler) == [("a", 1), ("b", 9)]
    assert step(scheduler) == [("a", 1), ("b", 7)]
    assert step(scheduler) == [("a", 1), ("b", 1)]


def test_sequences_start_in_order_and_never_more_than_allowed() -> None:
    scheduler = make(max_num_seqs=2)
    for name in "abc":
        scheduler.add(sequence(name, 4, first=ord(name) * 10))
    assert step(scheduler) == [("a", 4), ("b", 4)]
    assert [s.request.request_id for s in scheduler.waiting] == ["c"]


def test_the_youngest_is_preempted_and_computed_again_later() -> None:
    scheduler = make(num_blocks=4, max_num_seqs=2)
    scheduler.add(sequence("old", 7, max_tokens=9))
    scheduler.add(sequence("young", 7, max_tokens=9, first=100))
    order = []
    while scheduler.has_work:
        order.append(step(scheduler))
    assert scheduler.num_preemptions >= 1
    names = [name for one in order for name, _ in one]
    assert names.index("young") < len(names) - names[::-1].index("old"), "both ran at first"
    assert names[-1] == "young"
    assert scheduler.allocator.num_used == 0


def test_a_prompt_that_does_not_fit_waits_for_blocks_and_takes_none() -> None:
    scheduler = make(num_blocks=5)
    scheduler.add(sequence("a", 14))
    scheduler.add(sequence("b", 14, first=100))
    assert step(scheduler) == [("a", 14)]
    assert scheduler.allocator.num_used == 4


def test_equal_prompts_share_blocks_but_the_last_token_is_computed() -> None:
    scheduler = make(num_blocks=32)
    scheduler.add(sequence("a", 16))
    step(scheduler)
    scheduler.add(sequence("b", 16))
    assert step(scheduler)[1] == ("b", 4)
    assert scheduler.running[1].blocks[:3] == scheduler.running[0].blocks[:3]
    assert scheduler.running[1].num_cached == 12


def plenty(budget: int | None) -> Scheduler:
    """Room for all: only the budget makes anyone wait."""
    return make(num_blocks=4096, budget=budget, max_num_seqs=64)


def steps_until_read(scheduler: Scheduler, *wanted: Sequence) -> int:
    """Steps until each of these has its first token."""
    for count in range(1, 5000):
        step(scheduler)
        if all(sequence.num_output for sequence in wanted):
            return count
    raise AssertionError("never read")


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    scheduler = plenty(budget=64)
    scheduler.add(sequence("long", 1500))
    step(scheduler)
    scheduler.add(short := sequence("short", 30, first=5000))
    assert step(scheduler) == [("long", 34), ("short", 30)]
    assert short.num_output == 1


@given(
    budget=st.integers(8, 64),
    before=st.lists(st.integers(65, 400), max_size=6),
    beside=st.lists(st.integers(65, 400), max_size=6),
    num_steps=st.integers(0, 5),
    data=st.data(),
)
@settings(max_examples=100, deadline=None)
def test_what_fits_into_its_share_is_read_in_the_next_step(
    budget: int, before: list[int], beside: list[int], num_steps: int, data: st.DataObject
) -> None:
    """Whatever else is being read or waits to be, as long as nobody is being answered."""
    scheduler = plenty(budget)
    for i, length in enumerate(before):
        scheduler.add(sequence(f"before-{i}", length, max_tokens=1, first=1000 * i))
    for _ in range(num_steps):
        step(scheduler)
    for i, length in enumerate(beside):
        scheduler.add(sequence(f"beside-{i}", length, max_tokens=1, first=10000 + 1000 * i))
    short = sequence("short", data.draw(st.integers(1, budget // 2)), max_tokens=1, first=50000)
    scheduler.add(short)
    num_shorter = sum(one.num_uncomputed <= len(short.token_ids) for one in scheduler.running)
    assert steps_until_read(scheduler, short) <= 1 + num_shorter, "only what is shorter goes first"


@given(budget=st.integers(4, 64), lengths=st.lists(st.integers(1, 300), min_size=1, max_size=5), num=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_no_prompt_starves_however_many_shorter_ones_come(budget: int, lengths: list[int], num: int) -> None:
    """In each step at least half of the budget is for the oldest."""
    scheduler = plenty(budget)
    prompts = [sequence(f"long-{i}", length, max_tokens=1, first=1000 * i) for i, length in enumerate(lengths)]
    for prompt in prompts:
        scheduler.add(prompt)
    most = sum(-(-2 * length // budget) + 1 for length in lengths)
    for count in range(most):
        for i in range(num):
            first = 100000 + 1000 * count + 70 * i
            scheduler.add(sequence(f"short-{count}-{i}", budget // 2, max_tokens=1, first=first))
        step(scheduler)
    assert all(prompt.num_output for prompt in prompts)


def test_nobody_takes_the_room_that_the_oldest_waits_for() -> None:
    scheduler = make(num_blocks=6, budget=64)
    scheduler.add(sequence("a", 14, max_tokens=2))
    step(scheduler)
    scheduler.add(sequence("big", 17, max_tokens=1, first=100))
    scheduler.add(sequence("small", 3, max_tokens=1, first=200))
    assert step(scheduler) == [("a", 1)], "two blocks are free: enough for the small one, but it is not its turn"
    assert step(scheduler)[0] == ("big", 17)


def test_what_the_prefix_cache_holds_counts_as_read() -> None:
    scheduler = plenty(budget=64)
    scheduler.add(sequence("first", 200, max_tokens=1))
    while scheduler.has_work:
        step(scheduler)
    scheduler.add(sequence("other", 150, max_tokens=1, first=1000))
    scheduler.add(sequence("again", 201, max_tokens=1))
    assert ("again", 1) in step(scheduler)


@pytest.mark.parametrize("is_cached", [False, True])
def test_a_step_looks_up_only_so_much_for_those_that_wait(is_cached: bool) -> None:
    """Hashing every waiting prompt in its first step kept those that run waiting, the longer the prompts."""
    scheduler = make(num_blocks=404, budget=64, max_num_seqs=2)
    length, num = 1600, 40
    scheduler.add(sequence("first", length if is_cached else 1, max_tokens=1))
    while scheduler.has_work:
        step(scheduler)
    waiting = [sequence(str(i), length + 1, max_tokens=1) for i in range(num)]
    for one in waiting:
        scheduler.add(one)
    step(scheduler)
    waiting = [one for one in waiting if not one.blocks]
    assert len(waiting) > num / 2, "they are meant to wait"
    tried = 2 * length // 4  # by who is asked first whether there is room
    assert 0 < sum(len(one.hashes) for one in waiting) <= MAX_LOOKUPS + num + tried


def test_the_oldest_is_not_matched_again_before_there_may_be_room_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A follow-up of a long conversation cost each step of the others as much as it has blocks."""
    scheduler = make(num_blocks=16, budget=64)
    scheduler.add(sequence("first", 40, max_tokens=1))
    step(scheduler)
    scheduler.add(sequence("other", 20, max_tokens=8, first=100))
    step(scheduler)
    tries: list[object] = []
    match = scheduler.allocator.match_prefix
    monkeypatch.setattr(scheduler.allocator, "match_prefix", lambda hashes: tries.append(hashes) or match(hashes))
    scheduler.add(again := sequence("again", 60))
    for _ in range(7):
        assert step(scheduler) == [("other", 1)]
    assert len(tries) == 1
    step(scheduler)
    assert (len(tries), again.num_cached) == (2, 36)


def test_what_another_computes_meanwhile_makes_room() -> None:
    scheduler = make(num_blocks=10, budget=8)
    scheduler.add(sequence("a", 24, max_tokens=8))
    scheduler.add(sequence("b", 25, max_tokens=1))
    assert [step(scheduler) for _ in range(2)] == [[("a", 8)]] * 2, "both would need more blocks than there are"
    assert step(scheduler) == [("a", 8)]
    assert step(scheduler) == [("a", 1), ("b", 1)], "but not when they share them"


def test_what_is_found_no_more_counts_as_unread() -> None:
    scheduler = make(num_blocks=20)
    scheduler.add(sequence("first", 40, max_tokens=1))
    while scheduler.has_work:
        step(scheduler)
    again = sequence("again", 41)
    for _ in range(2):
        scheduler._look_up([again])
        assert scheduler._num_unread(again) == 1
    scheduler.allocator.allocate(15)
    scheduler._look_up([again])
    assert scheduler._num_unread(again) == 21
    scheduler.allocator.allocate(5)
    scheduler._look_up([again])
    assert scheduler._num_unread(again) == 41


def test_cached_tokens_are_those_of_the_prompt_at_its_first_admission() -> None:
    scheduler = make(num_blocks=8, budget=64, max_num_seqs=2)
    everyone = [sequence(name, 5, max_tokens=20, first=first) for name, first in (("old", 0), ("young", 100))]
    for one in everyone:
        scheduler.add(one)
    while scheduler.has_work:
        step(scheduler)
    assert scheduler.num_preemptions > 0, "the test is meant to preempt"
    assert [one.num_cached for one in everyone] == [0, 0]
    assert (scheduler.num_prefix_queries, scheduler.num_prefix_hits) == (10, 0)


def test_a_replay_counts_no_cached_tokens() -> None:
    scheduler = plenty(budget=64)
    for attempt in (0, 1, 1):
        request = GenerationRequest("a", "test", tuple(range(20)), SamplingParams(max_tokens=1), attempt=attempt)
        scheduler.add(replay := Sequence.of(request))
        step(scheduler)
        assert replay.num_cached == 0
    assert (scheduler.num_prefix_queries, scheduler.num_prefix_hits) == (20, 0)


def test_a_cut_leaves_no_single_token() -> None:
    scheduler = plenty(budget=20)
    scheduler.add(sequence("a", 21))
    assert step(scheduler) == [("a", 19)]
    scheduler.add(sequence("b", 17, first=100))
    scheduler.add(sequence("c", 9, first=200))
    assert step(scheduler) == [("a", 2), ("c", 9), ("b", 9)]


@given(
    arrivals=st.lists(
        st.tuples(st.integers(0, 5), st.integers(1, 30), st.integers(1, 20), st.integers(0, 1)), min_size=1, max_size=14
    ),
    aborts=st.sets(st.integers(0, 13)),
    budget=st.integers(3, 20),
    max_num_seqs=st.integers(1, 3),
)
@settings(max_examples=120, deadline=None)
def test_everything_finishes_whatever_comes(
    arrivals: list[tuple[int, int, int, int]], aborts: set[int], budget: int, max_num_seqs: int
) -> None:
    """Invariants hold after each step, the budget is kept, every sequence gets all its tokens, nothing leaks."""
    scheduler = make(num_blocks=14, budget=budget, max_num_seqs=max_num_seqs)
    sequences = [sequence(str(i), length, tokens, 100 * kind) for i, (_, length, tokens, kind) in enumerate(arrivals)]
    time = 0
    pending = sorted(enumerate(arrivals), key=lambda item: item[1][0])
    while pending or scheduler.has_work:
        while pending and pending[0][1][0] <= time:
            scheduler.add(sequences[pending.pop(0)[0]])
        chunks = step(scheduler)
        assert sum(length for _, length in chunks) <= budget
        assert chunks or not scheduler.has_work, "work, but nothing scheduled"
        for i in aborts & {time}:
            if i < len(sequences) and sequences[i] in (*scheduler.running, *scheduler.waiting):
                scheduler.finish(sequences[i], "abort")
                scheduler.check_integrity()
        time += 1
        assert time < 2000, "no progress"
    for seq in sequences:
        assert seq.finish_reason == "abort" or seq.num_output == seq.request.params.max_tokens
    assert scheduler.allocator.num_used == 0


def test_scored_rows_cover_the_prompt_exactly_once() -> None:
    params = SamplingParams(prompt_logprobs=0)
    seq = Sequence.of(GenerationRequest("a", "test", tuple(range(10)), params))
    assert seq.prompt_logprobs == [None]
    assert seq.num_logits(4) == 4
    seq.prompt_logprobs += [None] * 4
    seq.num_computed = 4
    assert seq.num_logits(6) == 6
    seq.reset()  # preempted: positions 0 to 3 are computed again, but their scores are known
    assert seq.num_logits(3) == 0
    assert seq.num_logits(8) == 4


def test_chunk_completes_only_with_the_last_token() -> None:
    seq = sequence("a", 5)
    assert not Chunk(seq, 4).completes
    assert Chunk(seq, 5).completes
