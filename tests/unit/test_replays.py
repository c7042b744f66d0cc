"""How requests survive what is lost on its way, and how they end where they can't. Fronts answer as told."""

import asyncio
import contextvars
from collections.abc import Callable
from typing import Any

import pytest

from actors.front import mailboxes
from cluster.messages.requests import RequestOutput, SamplingParams, TokenLogprob
from tests.unit.fake_front import LOST, FakeFront
from tests.unit.front_cluster import cluster, read, read_error, until

PARAMS = SamplingParams(max_tokens=4)
PROMPT = (1, 2)
pytestmark = pytest.mark.usefixtures("short_waits")


async def test_an_answer_that_is_lost_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The front has read its mailbox, and the connection breaks under the answer."""
    front, polls = FakeFront(), 0

    def lose_every_other(*args: Any) -> None:
        nonlocal polls
        polls += 1
        if polls % 2:
            raise LOST

    front.after["poll"] = lose_every_other
    async with cluster(monkeypatch, a=front) as found:
        stream = await found.client.submit("r", PROMPT, PARAMS)
        reading = asyncio.create_task(read(stream))
        for token in (5, 6, 7):
            front.say(front.taken[0], token)
            await asyncio.sleep(0.02)
        front.say(front.taken[0], 8, end="length")
        assert await reading == [5, 6, 7, 8]
        assert found.num_replays == 0


async def test_scores_in_parts_arrive_as_one_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """A front is lost among them: the next one sends all of them again."""
    monkeypatch.setattr(mailboxes, "MAX_LOGPROBS", 2)
    scores = (None, *(TokenLogprob(token, -1.0, 1) for token in range(6)))
    async with cluster(monkeypatch, a=FakeFront()) as found:
        dying = found.fronts["a"]
        stream = await found.client.submit("r", PROMPT, PARAMS)
        mailbox = dying.mailboxes.get(dying.taken[0].lease)
        assert mailbox is not None
        mailbox.put([RequestOutput(dying.taken[0].request_id, prompt_logprobs=scores[:3], is_part=True)])
        await until(lambda: len(stream._scores) == 3)
        await found.lose("a")
        await found.has(b=FakeFront())
        front = found.fronts["b"]
        await until(lambda: bool(front.taken))
        front.say(front.taken[0], 5, end="length", prompt_logprobs=scores)
        outputs = [output async for output in stream]
        assert [(output.token_ids, output.prompt_logprobs) for output in outputs] == [((5,), scores)]


async def test_links_and_replays_belong_to_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """GET /v1/cluster brings news of fronts, and its client leaves: Ray cancels the calls made in its context."""
    asked_by: contextvars.ContextVar[str] = contextvars.ContextVar("asked_by", default="nobody")
    calls: list[tuple[str, str]] = []

    def heard(name: str) -> FakeFront:
        front = FakeFront()
        for method in ("open", "poll", "close", "submit"):
            front.before[method] = lambda *_, method=method: calls.append((f"{name}.{method}", asked_by.get()))
        return front

    async with cluster(monkeypatch, a=heard("a")) as found:
        await found.client.submit("r", PROMPT, PARAMS)
        asked_by.set("a request")
        await found.has(b=heard("b"))
        await until(lambda: {"b.open", "b.poll", "b.submit", "a.close"} <= {call for call, _ in calls})
        assert {by for _, by in calls} == {"nobody"}


async def test_a_dead_front_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async with cluster(monkeypatch, a=FakeFront()) as found:
        dying = found.fronts["a"]
        stream = await found.client.submit("r", PROMPT, PARAMS)
        reading = asyncio.create_task(read(stream))
        dying.say(dying.taken[0], 5)
        await until(lambda: stream._emitted == [5])
        await found.lose("a")
        await found.has(b=FakeFront())
        front = found.fronts["b"]
        await until(lambda: bool(front.taken))
        assert (front.taken[0].output_token_ids, front.taken[0].attempt) == ((5,), 1)
        front.say(front.taken[0], 6, end="length")
        assert await reading == [5, 6]


@pytest.mark.parametrize("label", ["same", "team/{}", "a/b/{}"])
async def test_labels_of_clients_are_no_keys(monkeypatch: pytest.MonkeyPatch, label: str) -> None:
    """Many requests under names that clients chose, and one of two fronts dies under them."""
    async with cluster(monkeypatch, a=FakeFront(), b=FakeFront()) as found:
        streams = [await found.client.submit(label.format(i), (i,), PARAMS) for i in range(16)]
        survivor = found.fronts["b"]
        await found.lose("a")
        await until(lambda: len(survivor.taken) == 16)
        for request in survivor.taken:
            survivor.say(request, 100 + request.prompt_token_ids[0], end="length")
        assert [await read(stream) for stream in streams] == [[100 + i] for i in range(16)]


async def test_an_ingress_that_was_dropped_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was frozen for longer than its lease: the front has ended its sequences and forgotten its mailbox."""
    async with cluster(monkeypatch, a=FakeFront()) as found:
        front = found.fronts["a"]
        stream = await found.client.submit("r", PROMPT, PARAMS)
        reading = asyncio.create_task(read(stream))
        front.say(front.taken[0], 5)
        await until(lambda: stream._emitted == [5])
        front.mailboxes.close(front.taken[0].lease)
        await until(lambda: len(front.taken) == 2)
        assert front.taken[1].lease != front.taken[0].lease
        front.say(front.taken[1], 6, end="length")
        assert await reading == [5, 6]


async def test_what_has_ended_is_not_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last token has come, and only its reader is slow."""
    async with cluster(monkeypatch, a=FakeFront()) as found:
        front = found.fronts["a"]
        stream = await found.client.submit("r", PROMPT, PARAMS)
        front.say(front.taken[0], 5, end="length")
        await until(lambda: stream.is_complete)
        await found.lose("a")
        await found.has(b=FakeFront())
        assert await read(stream) == [5]
        assert found.num_replays == 0


async def test_a_front_that_left_is_told_to_end_what_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A front that counts as lost may live: its sequences must not run beside their replays."""
    async with cluster(monkeypatch, a=FakeFront()) as found:
        left = found.fronts["a"]
        left.before["close"] = failing(2)
        await found.client.submit("r", PROMPT, PARAMS)
        await found.has(b=FakeFront())
        await until(lambda: left.closed == [left.taken[0].lease])


async def test_an_abort_is_sent_until_it_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    async with cluster(monkeypatch, a=FakeFront()) as found:
        front = found.fronts["a"]
        front.before["abort"] = failing(3)
        stream = await found.client.submit("r", PROMPT, PARAMS)
        stream.close()
        await until(lambda: front.aborted == [front.taken[0].request_id])


def failing(times: int) -> Callable[..., None]:
    left = [LOST] * times

    def fail(*args: Any) -> None:
        if left:
            raise left.pop()

    return fail


async def test_an_abort_that_cannot_be_sent_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any) -> None:
        raise ValueError("no context")

    async with cluster(monkeypatch, a=FakeFront()) as found:
        front = found.fronts["a"]
        front.before["abort"] = wrong
        stream = await found.client.submit("r", PROMPT, PARAMS)
        stream.close()
        await asyncio.sleep(0.05)
        del front.before["abort"]
        await until(lambda: len(front.aborted) == 1)


# -- nothing hangs -------------------------------------------------------------------------------------------------


async def test_a_link_that_fails_unexpectedly_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise ValueError("no message of ours")

    async with cluster(monkeypatch, a=FakeFront()) as found:
        stream = await found.client.submit("r", PROMPT, PARAMS)
        found.fronts["a"].before["poll"] = fail
        await until(lambda: "a" not in found.client._links)
        await found.has(b=FakeFront())
        front = found.fronts["b"]
        await until(lambda: bool(front.taken))
        front.say(front.taken[0], 5, end="length")
        assert await read(stream) == [5]


async def test_a_replay_that_fails_unexpectedly_ends_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    async with cluster(monkeypatch, a=FakeFront()) as found:
        stream = await found.client.submit("r", PROMPT, PARAMS)
        await found.lose("a")
        await found.has(b=FakeFront(ValueError("out of order")))
        assert "out of order" in await read_error(stream)


async def test_without_a_successor_a_request_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    async with cluster(monkeypatch, a=FakeFront()) as found:
        stream = await found.client.submit("r", PROMPT, PARAMS)
        await found.lose("a")
        assert "no front has come back" in await read_error(stream)


async def test_a_request_that_kills_fronts_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async with cluster(monkeypatch, f0=FakeFront()) as found:
        stream = await found.client.submit("r", PROMPT, PARAMS)
        for number in range(1, 5):
            await found.lose(f"f{number - 1}")
            await found.has(**{f"f{number}": FakeFront()})
        assert "lost 4 times" in await read_error(stream)


async def test_fronts_that_leave_by_plan_don_t_count_as_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    async with cluster(monkeypatch, f0=FakeFront()) as found:
        stream = await found.client.submit("r", PROMPT, PARAMS)
        for number in range(1, 7):
            await found.has(**{f"f{number}": FakeFront()})
            await until(lambda: bool(found.fronts[f"f{number}"].taken))  # noqa: B023
        front = found.fronts["f6"]
        front.say(front.taken[0], 5, end="length")
        assert await read(stream) == [5]
