"""Which front takes a request, and what happens while none does: fronts that answer as told, without Ray."""

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from ray.exceptions import RayError

from cluster.messages.requests import SamplingParams, Submitted
from deploy.ingress.fronts import client as front_client
from deploy.ingress.fronts import link as front_link
from deploy.ingress.fronts.client import Overloaded, Unavailable
from deploy.ingress.fronts.output_stream import OutputStream
from tests.unit.fake_front import ACCEPTED, DRAINING, FULL, LOST, FakeFront, fronts_state
from tests.unit.front_cluster import cluster, until

PARAMS = SamplingParams(max_tokens=4)
PROMPT = (1, 2)
pytestmark = pytest.mark.usefixtures("short_waits")


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


async def test_only_so_many_wait_for_a_front_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are told at once that all is full, and may try again."""
    async with cluster(monkeypatch, max_held=2, a=FakeFront()) as found:
        a = found.fronts["a"]
        a.wait["submit"] = asyncio.Event()
        asking = [asyncio.create_task(found.client.submit("r", PROMPT, PARAMS)) for _ in range(1000)]
        await until(lambda: sum(task.done() for task in asking) == 998)
        assert len(found.client._links["a"].streams) == 2
        a.wait["submit"].set()
        results = await asyncio.gather(*asking, return_exceptions=True)
        assert [type(result) for result in results] == [OutputStream] * 2 + [Overloaded] * 998
        await found.client.submit("r", PROMPT, PARAMS)
        assert len(a.taken) == 3


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


async def test_a_front_that_opens_wakes_all_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that begin to wait in that very turn, while another one begins after them."""
    monkeypatch.setattr(front_client, "FRONT_WAIT_S", 60.0)
    async with cluster(monkeypatch) as found:
        deadline = time.monotonic() + 60
        waiting = asyncio.create_task(found.client._wait_for_front(deadline, 0.1))
        asyncio.get_running_loop().call_soon(found.client._links_changed.set)
        another = asyncio.create_task(found.client._wait_for_front(deadline, 0.1))
        await asyncio.wait_for(waiting, 5)
        another.cancel()


async def test_fronts_are_looked_up_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once at a time, though Ray may not answer for long; who has left when it does is not connected."""
    looked_up, answering = list[str](), threading.Event()

    def look_up(name: str, namespace: str) -> FakeFront:
        assert threading.current_thread() is not threading.main_thread()
        looked_up.append(name)
        answering.wait(5)
        return FakeFront()

    async with cluster(monkeypatch) as found:
        monkeypatch.setattr(front_client.ray, "get_actor", look_up)
        for _ in range(3):
            found.client.update(fronts_state(a=FakeFront(), b=FakeFront()))
            await until(lambda: len(looked_up) == 2)
        found.client.update(replace(fronts_state(), draining=("b",)))
        answering.set()
        await until(lambda: not found.client._sought)
        assert {name: link.is_draining for name, link in found.client._links.items()} == {"b": True}
        assert sorted(looked_up) == ["a", "b"]


async def test_a_front_that_is_not_found_is_looked_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async with cluster(monkeypatch) as found:
        for error in (ValueError("no such actor"), RuntimeError("no GCS")):
            monkeypatch.setattr(front_client.ray, "get_actor", failing(error))
            found.client.update(fronts_state(a=FakeFront()))
            await until(lambda: not found.client._sought)
        monkeypatch.setattr(front_client.ray, "get_actor", lambda *_: found.fronts["a"])
        await found.has(a=FakeFront())
        await found.client.submit("r", PROMPT, PARAMS)


def failing(error: Exception) -> Callable[..., None]:
    def fail(*_: str) -> None:
        raise error

    return fail


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
