"""Which front takes a request, what happens while none does, and how outputs survive what is lost on their way: fronts
that answer as told, without Ray.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayError

from actors import mailboxes
from cluster.messages import RequestOutput, SamplingParams, Submitted, TokenLogprob
from cluster.metrics import Metrics
from deploy import front_client, front_link
from deploy.front_client import FrontClient, Overloaded, Unavailable
from deploy.output_stream import OutputStream
from tests.unit.fake_front import ACCEPTED, DRAINING, FULL, LOST, FakeFront, fronts_state

PARAMS = SamplingParams(max_tokens=4)
PROMPT = (1, 2)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_client, "FRONT_WAIT_S", 0.3)
    monkeypatch.setattr(front_client, "PAUSE_S", (0.01, 0.02))
    monkeypatch.setattr(front_link, "RETRY_S", 0.01)
    monkeypatch.setattr(front_link, "FULL_S", 0.0)


class Cluster:
    """An ingress's client, and the fronts that it finds by name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, max_held: int = 100) -> None:
        self.fronts: dict[str, FakeFront] = {}
        self.metrics = Metrics()
        self.client = FrontClient("ingress", self.metrics, max_held)
        monkeypatch.setattr(front_client.ray, "get_actor", lambda name, namespace: self.fronts[name])

    async def has(self, **fronts: FakeFront) -> None:
        """From now on these are its fronts."""
        self.fronts = fronts
        self.client.update(fronts_state(**fronts))
        await until(lambda: all(link.is_open for link in self.client._links.values()))

    async def lose(self, name: str) -> None:
        """The actor dies: whatever is asked of it fails. Returns when the client has noticed."""

        def die(*args: Any) -> None:
            raise ActorDiedError

        self.fronts.pop(name).before |= dict.fromkeys(("poll", "submit", "abort", "close", "open"), die)
        await until(lambda: name not in self.client._links)

    @property
    def num_replays(self) -> float:
        return sum(value for name, _, value in self.metrics.samples() if name == "outcrop_front_replays_total")


@asynccontextmanager
async def cluster(
    monkeypatch: pytest.MonkeyPatch, *, max_held: int = 100, **fronts: FakeFront
) -> AsyncIterator[Cluster]:
    found = Cluster(monkeypatch, max_held)
    await found.has(**fronts)
    try:
        yield found
    finally:
        await found.client.close()


async def until(is_true: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not is_true():
            await asyncio.sleep(0.005)


async def read(stream: OutputStream) -> list[int]:
    """All tokens of a stream, once it has ended."""
    async with asyncio.timeout(5):
        return [token async for output in stream for token in output.token_ids]


async def read_error(stream: OutputStream) -> str:
    async with asyncio.timeout(5):
        last: RequestOutput = [output async for output in stream][-1]
    assert last.error is not None
    return last.error


# -- which front --------------------------------------------------------------------------------------------------


async def test_the_least_loaded_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async with cluster(monkeypatch, busy=FakeFront(), idle=FakeFront()) as found:
        found.client._links["busy"].outstanding_tokens = 1
        await found.client.submit("r", PROMPT, PARAMS)
        assert [len(front.taken) for front in found.fronts.values()] == [0, 1]


@pytest.mark.parametrize("refusal", [FULL, DRAINING, LOST])
async def test_another_takes_what_one_refuses(monkeypatch: pytest.MonkeyPatch, refusal: Submitted | RayError) -> None:
    async with cluster(monkeypatch, a=FakeFront(refusal), b=FakeFront()) as found:
        await found.client.submit("r", PROMPT, PARAMS)
        assert len(found.fronts["b"].taken) == 1


async def test_all_full_is_overloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    async with cluster(monkeypatch, a=FakeFront(FULL), b=FakeFront(FULL)) as found:
        with pytest.raises(Overloaded):
            await found.client.submit("r", PROMPT, PARAMS)


async def test_a_full_front_is_not_sent_prompts_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_link, "FULL_S", 60.0)
    async with cluster(monkeypatch, a=FakeFront(FULL)) as found:
        for _ in range(5):
            with pytest.raises(Overloaded):
                await found.client.submit("r", PROMPT, PARAMS)
        assert len(found.fronts["a"].offered) == 1


@pytest.mark.parametrize("refusal", [DRAINING, LOST])
async def test_fronts_that_are_going_are_not_overload(
    monkeypatch: pytest.MonkeyPatch, refusal: Submitted | RayError
) -> None:
    """The last one dies before anybody has noticed: requests wait for its successor."""
    async with cluster(monkeypatch, a=FakeFront(refusal)) as found:
        waiting = asyncio.create_task(found.client.submit("r", PROMPT, PARAMS))
        await until(lambda: bool(found.fronts["a"].offered))
        await found.has(b=FakeFront())
        await waiting
        assert len(found.fronts["b"].taken) == 1


async def test_a_front_that_answers_again_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each offer has an id of its own: the abort of one whose answer was lost does not end the next."""
    async with cluster(monkeypatch, a=FakeFront(LOST, LOST, ACCEPTED)) as found:
        await found.client.submit("r", PROMPT, PARAMS)
        front = found.fronts["a"]
        await until(lambda: len(front.aborted) == 2)
        assert front.taken[0].request_id not in front.aborted
        assert len({request.request_id for request in front.offered}) == 3


async def test_a_front_that_never_answers_holds_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is frozen, and takes what it was offered when it wakes: then the abort is there, too."""
    monkeypatch.setattr(front_link, "CALL_TIMEOUT_S", 0.05)
    frozen = asyncio.Event()
    async with cluster(monkeypatch, a=FakeFront(), b=FakeFront()) as found:
        a, b = found.fronts.values()
        found.client._links["b"].outstanding_tokens = 1
        monkeypatch.setattr(a, "do_submit", lambda request: frozen.wait(), raising=False)
        await found.client.submit("r", PROMPT, PARAMS)
        assert len(b.taken) == 1
        await until(lambda: len(a.aborted) == 1)


async def test_a_front_that_may_hang_is_asked_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """One request waits for it, not each that comes after; once it answers a poll it is as good as any."""
    monkeypatch.setattr(front_link, "CALL_TIMEOUT_S", 0.05)
    hanging, polls = asyncio.Event(), asyncio.Event()
    async with cluster(monkeypatch, a=FakeFront(), b=FakeFront()) as found:
        a = found.fronts["a"]
        a.wait |= {"submit": hanging, "poll": polls}
        await until(lambda: a.num_waiting["poll"] == 1)
        for _ in range(4):
            await found.client.submit("r", PROMPT, PARAMS)
        assert (a.num_waiting["submit"], len(found.fronts["b"].taken)) == (1, 4)
        hanging.set()
        polls.set()
        await until(lambda: not found.client._links["a"].is_doubtful)
        await found.client.submit("r", PROMPT, PARAMS)
        assert len(a.taken) == 1


async def test_a_front_that_is_ready_again_after_all_takes_who_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new supervisor calls a front draining until it has told who it is."""
    monkeypatch.setattr(front_client, "FRONT_WAIT_S", 60.0)
    async with cluster(monkeypatch, a=FakeFront()) as found:
        found.client.update(replace(fronts_state(), draining=("a",)))
        waiting = asyncio.create_task(found.client.submit("r", PROMPT, PARAMS))
        await until(lambda: found.client._num_held == 1)
        found.client.update(fronts_state(a=found.fronts["a"]))
        await asyncio.wait_for(waiting, 5)


@pytest.mark.parametrize("answer", [None, DRAINING, LOST])
async def test_no_front_for_long_is_unavailable(
    monkeypatch: pytest.MonkeyPatch, answer: Submitted | RayError | None
) -> None:
    fronts = {} if answer is None else {"a": FakeFront(answer)}
    async with cluster(monkeypatch, **fronts) as found:
        with pytest.raises(Unavailable):
            await found.client.submit("r", PROMPT, PARAMS)


async def test_without_a_front_only_so_many_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    async with cluster(monkeypatch, max_held=2) as found:
        waiting = [asyncio.create_task(found.client.submit("r", PROMPT, PARAMS)) for _ in range(2)]
        await asyncio.sleep(0.02)
        with pytest.raises(Overloaded):
            await found.client.submit("r", PROMPT, PARAMS)
        await found.has(a=FakeFront())
        await asyncio.gather(*waiting)
        assert len(found.fronts["a"].taken) == 2


# -- what is lost on its way ---------------------------------------------------------------------------------------


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
