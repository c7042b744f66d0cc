"""Which front takes a request, and what happens while none does: with handles that answer as told, without Ray."""

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorUnavailableError, RayError

from cluster.messages import SamplingParams, Submitted
from cluster.metrics import Metrics
from deploy import front_client
from deploy.front_client import FrontClient, OutputStream, Overloaded, Unavailable, _Front

ACCEPTED, FULL, DRAINING = Submitted(True), Submitted(False, "full"), Submitted(False, "draining")
LOST = ActorUnavailableError("lost", None)


def front(name: str, *answers: Submitted | RayError) -> _Front:
    """A front that gives these answers to submit(), the last one again and again."""
    left = list(answers)

    def submit(request: object) -> Awaitable[Submitted]:
        answer = left.pop(0) if len(left) > 1 else left[0]

        async def reply() -> Submitted:
            if isinstance(answer, RayError):
                raise answer
            return answer

        return reply()

    return _Front(name, SimpleNamespace(submit=SimpleNamespace(remote=submit)))


def submit(*fronts: _Front, later: Callable[[FrontClient], None] | None = None) -> tuple[OutputStream, list[str]]:
    """The stream, and the names of the fronts that have it."""

    async def run() -> tuple[OutputStream, list[str]]:
        client = FrontClient("ingress", Metrics())
        client._fronts = {each.name: each for each in fronts}
        if later:
            asyncio.get_running_loop().call_later(0.05, later, client)
        stream = await client.submit("r", (1, 2), SamplingParams(max_tokens=4))
        return stream, [name for name, each in client._fronts.items() if each.streams]

    return asyncio.run(run())


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_client, "FRONT_WAIT_S", 0.3)
    monkeypatch.setattr(front_client, "PAUSE_S", 0.01)


def test_the_least_loaded_takes_it() -> None:
    busy, idle = front("busy", ACCEPTED), front("idle", ACCEPTED)
    busy.outstanding_tokens = 1
    assert submit(busy, idle)[1] == ["idle"]


@pytest.mark.parametrize("refusal", [FULL, DRAINING, LOST])
def test_another_takes_what_one_refuses(refusal: Submitted | RayError) -> None:
    assert submit(front("a", refusal), front("b", ACCEPTED))[1] == ["b"]


def test_all_full_is_overloaded() -> None:
    with pytest.raises(Overloaded):
        submit(front("a", FULL), front("b", FULL))


@pytest.mark.parametrize("refusal", [DRAINING, LOST])
def test_fronts_that_are_going_are_not_overload(refusal: Submitted | RayError) -> None:
    """The last one dies before anybody has noticed: requests wait for its successor."""

    def replace(client: FrontClient) -> None:
        client._fronts = {"b": front("b", ACCEPTED)}
        client._fronts_changed.set()

    assert submit(front("a", refusal), later=replace)[1] == ["b"]


def test_a_front_that_answers_again_takes_it() -> None:
    assert submit(front("a", LOST, LOST, ACCEPTED))[1] == ["a"]


@pytest.mark.parametrize("fronts", [[], [front("a", DRAINING)], [front("a", LOST)]])
def test_no_front_for_long_is_unavailable(fronts: list[_Front]) -> None:
    with pytest.raises(Unavailable):
        submit(*fronts)
