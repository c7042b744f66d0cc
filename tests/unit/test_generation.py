"""How the choices of one request are handed to fronts: all at once, or none."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from cluster.messages.requests import GenerationRequest, SamplingParams, Submitted, TokenLogprob
from cluster.metrics import Metrics
from deploy.ingress.fronts import client as front_client
from deploy.ingress.fronts.client import FrontClient, Overloaded
from deploy.ingress.generation import Generation, GenerationFailed, Plan
from deploy.ingress.openai.choices import Choice, ChoiceDelta
from deploy.ingress.openai.parsing import parse_body
from deploy.ingress.openai.requests import CompletionRequest
from deploy.ingress.text.tokens import Tokenizer
from tests import tiny_tokenizers
from tests.unit.fake_front import FakeFront, fronts_state

TOKENIZER = Tokenizer(tiny_tokenizers.byte_level())
REQUEST = parse_body(b'{"prompt": "Hi"}', CompletionRequest)
PARAMS = SamplingParams(max_tokens=4)


class Handle(FakeFront):
    """A front that answers submit() once it has been asked `waits_for` times, and takes `room` sequences."""

    def __init__(self, waits_for: int = 1, room: int = 99) -> None:
        super().__init__()
        self.all_there = asyncio.Event()
        self._waits_for, self._room = waits_for, room

    async def do_submit(self, request: GenerationRequest) -> Submitted:
        self.offered.append(request)
        number = len(self.offered)
        if number >= self._waits_for:
            self.all_there.set()
        await self.all_there.wait()
        if number > self._room:
            return Submitted(False, "full")
        self.taken.append(request)
        return Submitted(True)


@asynccontextmanager
async def generation(n: int, **fronts: FakeFront) -> AsyncIterator[Generation]:
    client = FrontClient("ingress", Metrics(), max_held=9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(front_client.ray, "get_actor", lambda name, namespace: fronts[name])
        client.update(fronts_state(**fronts))
        await eventually(lambda: len(client._open_links()) == len(fronts))
    choices = [Choice(i, REQUEST, PARAMS, (1, 2), TOKENIZER) for i in range(n)]
    yield Generation([Plan(choice, (1, 2), PARAMS) for choice in choices], client, Metrics(), "r")
    await client.close()


async def test_choices_are_submitted_together() -> None:
    front = Handle(waits_for=3)
    async with generation(3, a=front) as request:
        await asyncio.wait_for(request.submit(), 5)
        assert [each.label for each in front.offered] == ["r-0", "r-1", "r-2"]


async def test_choices_that_are_submitted_together_spread_over_fronts() -> None:
    fronts = Handle(waits_for=2), Handle(waits_for=2)
    async with generation(4, a=fronts[0], b=fronts[1]) as request:
        await asyncio.wait_for(request.submit(), 5)
    assert [len(front.taken) for front in fronts] == [2, 2]


async def test_if_one_choice_finds_no_place_the_others_are_taken_back() -> None:
    front = Handle(waits_for=3, room=2)
    async with generation(3, a=front) as request:
        with pytest.raises(Overloaded):
            await asyncio.wait_for(request.submit(), 5)
        await eventually(lambda: sorted(front.aborted) == sorted(each.request_id for each in front.taken))


async def test_a_client_that_leaves_meanwhile_takes_its_choices_back() -> None:
    """They may have been taken, and only the answers are missing."""
    front = Handle(waits_for=9)
    async with generation(3, a=front) as request:
        task = asyncio.create_task(request.submit())
        await eventually(lambda: len(front.offered) == 3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await eventually(lambda: len(front.aborted) == 3)


async def test_what_takes_long_to_take_in_is_done_elsewhere() -> None:
    """A prompt that is echoed comes with the first output; `run` knows how long that takes."""
    front, sizes = Handle(), list[int]()

    async def run(size: int, work: Callable[[], ChoiceDelta]) -> ChoiceDelta:
        sizes.append(size)
        return work()

    echoing = parse_body(b'{"prompt": "Hi", "echo": true}', CompletionRequest)
    async with generation(1, a=front) as request:
        request._run = run
        request.choices[0]._request = echoing
        request.choices[0]._echoed = ["a"] * 500
        await request.submit()
        front.say(front.taken[0], 5)
        front.say(front.taken[0], 6, end="length")
        assert (await read(request))[0].text.startswith("a" * 500)
        assert sizes[0] > 10 * 500 > sizes[1]


async def test_a_choice_that_fails_unexpectedly_ends_its_request() -> None:
    """Whatever is wrong in what a front says, the client gets an answer."""
    front = Handle()
    async with generation(2, a=front) as request:
        await request.submit()
        front.say(front.taken[0], 5, logprobs=(TokenLogprob(5, 0.0, 1), TokenLogprob(6, 0.0, 1)))  # two for one token
        with pytest.raises(GenerationFailed):
            await asyncio.wait_for(read(request), 5)
        request.close()


async def test_what_waits_for_a_reader_comes_in_one_piece_with_every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    front = Handle()
    body = parse_body(b'{"prompt": "Hi", "logprobs": 1, "return_token_ids": true}', CompletionRequest)
    params = SamplingParams(max_tokens=4, logprobs=1)
    async with generation(2, a=front) as request:
        for choice in request.choices:
            choice._request, choice._params = body, params
        await request.submit()
        deltas = request.deltas()
        front.say(front.taken[0], 72, logprobs=(TokenLogprob(72, -1.0, 1),))
        first = await anext(deltas)
        for token in (105, 106):
            for taken in front.taken:
                front.say(taken, token, logprobs=(TokenLogprob(token, -float(token), 1),))
        await eventually(lambda: [choice.num_tokens for choice in request.choices] == [3, 2])
        pieces = [await anext(deltas), await anext(deltas)]
        assert [(piece.index, piece.token_ids) for piece in (first, *pieces)] == [
            (0, (72,)),
            (0, (105, 106)),
            (1, (105, 106)),
        ]
        assert [(r.token_id, r.logprob.logprob, r.text_offset) for r in pieces[0].rows if r.logprob] == [
            (105, -105.0, len(first.text)),
            (106, -106.0, len(first.text) + 1),
        ]
        for taken in front.taken:
            front.say(taken, 107, end="length", logprobs=(TokenLogprob(107, 0.0, 1),))
        assert [delta.finish_reason async for delta in deltas] == ["length", "length"]


async def read(request: Generation) -> list[ChoiceDelta]:
    return [delta async for delta in request.deltas()]


async def eventually(is_true: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not is_true():
            await asyncio.sleep(0.005)
