"""How the choices of one request are handed to fronts: all at once, or none."""

import asyncio
from types import SimpleNamespace

import pytest

from cluster.messages import GenerationRequest, SamplingParams, Submitted
from cluster.metrics import Metrics
from deploy.front_client import FrontClient, Overloaded, _Front
from deploy.generation import Generation, Plan
from deploy.openai.choices import Choice
from deploy.openai.parsing import parse_body
from deploy.openai.requests import CompletionRequest
from deploy.text import Tokenizer
from tests import tiny_tokenizers

TOKENIZER = Tokenizer(tiny_tokenizers.byte_level())
REQUEST = parse_body(b'{"prompt": "Hi"}', CompletionRequest)
PARAMS = SamplingParams(max_tokens=4)


class Handle:
    """A front that answers submit() once it has been asked `waits_for` times, and takes `room` sequences."""

    def __init__(self, waits_for: int = 1, room: int = 99) -> None:
        self.asked: list[str] = []
        self.submit = SimpleNamespace(remote=self._submit)
        self._all_there = asyncio.Event()
        self._waits_for, self._room = waits_for, room

    async def _submit(self, request: GenerationRequest) -> Submitted:
        self.asked.append(request.request_id)
        is_full = len(self.asked) > self._room
        if len(self.asked) >= self._waits_for:
            self._all_there.set()
        await self._all_there.wait()
        return Submitted(False, "full") if is_full else Submitted(True)


def generation(fronts: list[_Front], n: int) -> Generation:
    client = FrontClient("ingress", Metrics())
    client._fronts = {front.name: front for front in fronts}
    choices = [Choice(i, REQUEST, PARAMS, (1, 2), TOKENIZER) for i in range(n)]
    return Generation([Plan(choice, (1, 2), PARAMS) for choice in choices], client, Metrics(), "r")


async def test_choices_are_submitted_together() -> None:
    handle = Handle(waits_for=3)
    request = generation([_Front("a", handle)], 3)
    await asyncio.wait_for(request.submit(), 5)
    assert handle.asked == [f"{request.id}-{i}" for i in range(3)]


async def test_choices_that_are_submitted_together_spread_over_fronts() -> None:
    handles = Handle(waits_for=2), Handle(waits_for=2)
    await asyncio.wait_for(generation([_Front(str(i), h) for i, h in enumerate(handles)], 4).submit(), 5)
    assert [len(handle.asked) for handle in handles] == [2, 2]


async def test_if_one_choice_finds_no_place_the_others_are_taken_back() -> None:
    front = _Front("a", Handle(waits_for=3, room=2))
    request = generation([front], 3)
    with pytest.raises(Overloaded):
        await asyncio.wait_for(request.submit(), 5)
    assert {front.aborts.get_nowait() for _ in range(2)} == {f"{request.id}-{i}" for i in range(2)}
    assert (front.streams, front.outstanding_tokens) == ({}, 0)


async def test_a_client_that_leaves_meanwhile_takes_its_choices_back() -> None:
    front = _Front("a", Handle(waits_for=9))
    task = asyncio.create_task(generation([front], 3).submit())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert front.aborts.qsize() == 3, "they may have been taken, and only the answers are missing"
    assert not front.streams
