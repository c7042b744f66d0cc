"""Two micro-batches: how a step is cut, in which order the halves go, and when it is done at all."""

from collections.abc import Generator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from actors.dispatch.dispatcher import Dispatcher
from actors.engine.overlap import LEAST_TOKENS, RETRY, Overlap
from actors.model.batch import Span, StepBatch
from actors.model.routing import interleave


def batch_of(lengths: list[int], contexts: list[int]) -> StepBatch:
    spans, start = [], 0
    for length, context in zip(lengths, contexts, strict=True):
        spans.append(Span(start, length, context))
        start += length
    numbers = torch.arange(start)
    blocks = torch.arange(len(lengths), dtype=torch.int32)[:, None]
    return StepBatch(numbers, 10 + numbers, 20 + numbers, blocks, numbers[numbers % 3 != 1], tuple(spans))


@given(st.lists(st.integers(2, 9), max_size=5), st.integers(0, 6), st.data())
def test_halves_are_the_whole_in_order(chunks: list[int], num_single: int, data: st.DataObject) -> None:
    lengths = [1] * num_single + chunks
    if not lengths:
        return
    whole = batch_of(lengths, [n + data.draw(st.integers(0, 20)) for n in lengths])
    halves = whole.halves()
    for name in ("token_ids_T", "positions_T", "slots_T"):
        assert torch.cat([getattr(half, name) for half in halves]).equal(getattr(whole, name))
    rows, seen, at = [], [], 0
    for half in halves:
        rows += (half.rows_R + at).tolist()
        assert [span.length for span in half.spans[: half.num_single]] == [1] * half.num_single, "singles come first"
        starts = [sum(s.length for s in half.spans[:i]) for i in range(len(half.spans))]
        assert [span.start for span in half.spans] == starts
        for span, blocks in zip(half.spans, half.blocks_SB, strict=True):
            last = span.context - 1  # position within the sequence of the span's last token
            seen += [(int(blocks[0]), last - span.length + 1 + i) for i in range(span.length)]
        at += half.num_tokens
    assert rows == whole.rows_R.tolist()
    assert seen == [(n, s.context - s.length + i) for n, s in enumerate(whole.spans) for i in range(s.length)]
    if whole.num_tokens >= 4:
        assert abs(halves[0].num_tokens - whole.num_tokens / 2) <= 1.5


class Recorder(Dispatcher):
    """Dispatches that can be told apart; the expert of a token adds 1 to it."""

    def __init__(self, fails_at: int = -1) -> None:
        self.log: list[tuple[str, Any]] = []
        self.fails_at = fails_at

    def dispatch(self, layer: int, x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor) -> Any:
        self.log.append(("dispatch", (int(ids_TK), layer)))
        return int(ids_TK), layer, x_TD

    def combine(self, pending: Any) -> Tensor:
        name, layer, x_TD = pending
        if layer == self.fails_at:
            raise RuntimeError("no experts")
        self.log.append(("combine", (name, layer)))
        return x_TD + 1  # type: ignore[no-any-return]

    def forget(self, pending: Any) -> None:
        self.log.append(("forget", pending[:2]))


def way(dispatcher: Dispatcher, name: int, num_layers: int) -> Generator[Any, Tensor, float]:
    x = torch.full((1, 1), 100.0 * name)
    for layer in range(num_layers):
        x = yield dispatcher.dispatch(layer, x, torch.tensor(name), x)
    return float(x)


def test_one_computes_while_the_other_waits() -> None:
    recorder = Recorder()
    assert interleave([way(recorder, name, 2) for name in (1, 2)], recorder) == [102, 202]
    assert recorder.log == [
        ("dispatch", (1, 0)), ("dispatch", (2, 0)),
        ("combine", (1, 0)), ("dispatch", (1, 1)), ("combine", (2, 0)), ("dispatch", (2, 1)),
        ("combine", (1, 1)), ("combine", (2, 1)),
    ]  # fmt: skip


def test_what_is_on_its_way_is_given_up_when_the_step_fails() -> None:
    recorder = Recorder(fails_at=1)
    with pytest.raises(RuntimeError, match="no experts"):
        interleave([way(recorder, name, 3) for name in (1, 2)], recorder)
    assert recorder.log[-1] == ("forget", (2, 1))


def steps(overlap: Overlap, number: int, plain: float, split: float, num_tokens: int = 256) -> list[bool]:
    taken = []
    for _ in range(number):
        is_split = overlap.is_wanted(num_tokens)
        overlap.observe(num_tokens, is_split, split if is_split else plain)
        taken.append(is_split)
    return taken


@pytest.mark.parametrize(("split", "pays"), [(0.8, True), (1.2, False), (0.99, False)])
def test_the_faster_way_is_used(split: float, pays: bool) -> None:
    overlap = Overlap("auto")
    assert sum(steps(overlap, 8, 1.0, split)) == 4, "both ways are tried equally often"
    assert set(steps(overlap, RETRY - 1, 1.0, split)) == {pays}
    assert steps(overlap, 1, 1.0, split) == [not pays], "the other way is tried again now and then"


def test_sizes_are_judged_apart_and_the_world_may_change() -> None:
    overlap = Overlap("auto")
    steps(overlap, 20, 1.0, 0.5, num_tokens=512)
    steps(overlap, 20, 1.0, 2.0, num_tokens=128)
    assert overlap.is_wanted(512)
    assert not overlap.is_wanted(128)
    steps(overlap, 9 * RETRY, 1.0, 2.0, num_tokens=512)
    assert not overlap.is_wanted(512)


@pytest.mark.parametrize(("mode", "expected"), [("always", True), ("never", False)])
def test_modes_that_are_fixed(mode: Any, expected: bool) -> None:
    overlap = Overlap(mode)
    assert set(steps(overlap, 20, 1.0, 0.5 if expected is False else 2.0)) == {expected}


def test_small_steps_are_never_cut_on_trial() -> None:
    assert steps(Overlap("auto"), 20, 1.0, 0.1, num_tokens=LEAST_TOKENS - 1) == [False] * 20
