"""The thread around an engine: whatever fails in it, no request waits for ever. With an engine that does as told."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from actors.front import loop as front_loop
from actors.front.loop import FrontLoop
from cluster.messages.requests import GenerationRequest, PromptEmbeds, RequestOutput, SamplingParams

MAX_WAITING = 2


class FakeEngine:
    """Gives each sequence one token and ends it, unless `fail` says otherwise."""

    def __init__(self) -> None:
        self.is_broken = False
        self.scheduler = SimpleNamespace(waiting=[])
        self.sequences: list[str] = []
        self.aborted: list[str] = []
        self.fail: dict[str, Callable[..., None]] = {}

    @property
    def has_work(self) -> bool:
        return bool(self.sequences)

    def add(self, request: GenerationRequest, constraint: object = None) -> None:
        self.fail.get("add", nothing)(request)
        self.sequences.append(request.request_id)

    def abort(self, request_id: str) -> None:
        self.fail.get("abort", nothing)(request_id)
        self.aborted.append(request_id)
        if request_id in self.sequences:
            self.sequences.remove(request_id)

    def step(self) -> list[RequestOutput]:
        self.fail.get("step", nothing)()
        ended, self.sequences = self.sequences, []
        return [RequestOutput(request_id, (1,), finish_reason="length") for request_id in ended]


def nothing(*args: Any) -> None:
    return None


def boom(*args: Any) -> None:
    raise ValueError("boom")


@asynccontextmanager
async def running(engine: FakeEngine, give_up: Callable[[], None] = nothing) -> AsyncIterator[FrontLoop]:
    spec: Any = SimpleNamespace(actor_id="front-0", engine=SimpleNamespace(max_num_waiting=MAX_WAITING))
    loop = FrontLoop(spec, "test", give_up)
    loop.engine = engine  # type: ignore[assignment]
    loop.mailboxes.open("in")
    loop.start(asyncio.get_running_loop())
    yield loop


def request(request_id: str, **fields: Any) -> GenerationRequest:
    return GenerationRequest(request_id, "in", (1, 2), SamplingParams(), **fields)


async def outputs(loop: FrontLoop, acknowledged: int = 0) -> tuple[RequestOutput, ...]:
    mailbox = loop.mailboxes.get("in")
    assert mailbox is not None
    return (await mailbox.take(acknowledged, 5)).outputs


async def until(is_true: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not is_true():
            await asyncio.sleep(0.005)


async def test_an_engine_that_always_fails_ends_the_front(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_loop, "FAILED_TURN_PAUSE_S", 0.0)
    engine, given_up = FakeEngine(), threading.Event()
    engine.fail["step"] = boom
    async with running(engine, given_up.set) as loop:
        loop.submit(request("r"))
        assert await asyncio.to_thread(given_up.wait, 5)


async def test_an_engine_that_says_that_it_is_broken_ends_the_front_at_once() -> None:
    engine, given_up, steps = FakeEngine(), threading.Event(), list[int]()

    def break_down() -> None:
        steps.append(1)
        engine.is_broken = True
        boom()

    engine.fail["step"] = break_down
    async with running(engine, given_up.set) as loop:
        loop.submit(request("r"))
        assert await asyncio.to_thread(given_up.wait, 5)
        assert len(steps) == 1
        assert not loop.mailboxes.num_outputs, "its requests go on elsewhere"


async def test_an_engine_that_fails_now_and_then_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_loop, "FAILED_TURN_PAUSE_S", 0.0)
    engine, given_up, left = FakeEngine(), threading.Event(), [boom] * (front_loop.MAX_FAILED_TURNS - 1)
    engine.fail["step"] = lambda: left.pop()() if left else None
    async with running(engine, given_up.set) as loop:
        loop.submit(request("r"))
        assert [output.request_id for output in await outputs(loop)] == ["r"]
        assert not given_up.is_set()


async def test_a_command_that_fails_does_not_lose_those_behind_it() -> None:
    engine = FakeEngine()
    engine.fail["abort"] = lambda request_id: boom() if request_id == "bad" else None
    held = threading.Event()
    engine.fail["step"] = lambda: held.wait(5)
    async with running(engine) as loop:
        loop.submit(request("r"))
        await until(lambda: engine.has_work)
        for request_id in ("bad", "good"):
            loop.abort((request_id,))
        held.set()
        await until(lambda: engine.aborted == ["good"])


async def test_a_request_that_can_t_be_taken_in_ends_with_an_error_alone() -> None:
    engine = FakeEngine()
    engine.fail["add"] = lambda request: boom() if request.request_id == "bad" else None
    async with running(engine) as loop:
        for request_id in ("bad", "good"):
            loop.submit(request(request_id))
        await until(lambda: loop.mailboxes.num_outputs == 2)
        bad, good = await outputs(loop)
        assert (bad.request_id, bad.error, bad.finish_reason) == ("bad", "ValueError: boom", "error")
        assert (good.request_id, good.error) == ("good", None)


async def test_an_abort_may_overtake_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_loop, "EXPIRE_PERIOD_S", 0.01)
    engine, held = FakeEngine(), threading.Event()
    engine.fail["step"] = lambda: held.wait(5)
    async with running(engine) as loop:
        loop.submit(request("known"))
        loop.abort(("known", "late"))
        assert loop.submit(request("late")).reason == "dropped"
        assert loop.submit(request("another")).accepted
        held.set()
        assert list(loop._aborted) == ["late"], "no more is remembered than is needed"
        monkeypatch.setattr(front_loop, "ABORTED_S", 0.0)
        await until(lambda: not loop._aborted)


async def test_a_lease_that_ends_takes_its_sequences_with_it() -> None:
    engine, held = FakeEngine(), threading.Event()
    engine.fail["step"] = lambda: held.wait(5)
    async with running(engine) as loop:
        loop.submit(request("r"))
        await until(lambda: engine.has_work)
        loop.close_lease("in")
        held.set()
        await until(lambda: engine.aborted == ["r"])
        assert loop.submit(request("s")).reason == "dropped"


async def test_a_full_front_takes_what_another_one_has_lost() -> None:
    engine, held = FakeEngine(), threading.Event()
    engine.fail["step"] = lambda: held.wait(5)
    async with running(engine) as loop:
        engine.scheduler.waiting = ["w"] * MAX_WAITING
        assert loop.submit(request("new")).reason == "full"
        assert loop.submit(request("replayed", attempt=1)).accepted
        held.set()


async def test_a_step_that_does_not_end_shows() -> None:
    engine, held = FakeEngine(), threading.Event()
    async with running(engine) as loop:
        engine.fail["step"] = lambda: held.wait(5)
        loop.submit(request("r"))
        await until(lambda: engine.has_work)
        before = loop.stuck_seconds
        await until(lambda: loop.stuck_seconds > before + front_loop.IDLE_WAIT_S)
        held.set()
        await until(lambda: loop.stuck_seconds < before + front_loop.IDLE_WAIT_S)


async def test_prompts_that_come_as_embeddings_wait_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_loop, "MAX_WAITING_EMBEDS_BYTES", 100)
    engine, held = FakeEngine(), threading.Event()
    engine.fail["step"] = lambda: held.wait(5)

    def embeds(size: int) -> PromptEmbeds:
        return PromptEmbeds((1, size // 4), "float32", bytes(size))

    async with running(engine) as loop:
        loop.submit(request("r"))
        await until(lambda: engine.has_work)
        assert loop.submit(request("a", prompt_embeds=embeds(160))).accepted, "one is always taken"
        assert loop.submit(request("b", prompt_embeds=embeds(4))).reason == "full"
        assert loop.submit(request("d")).accepted
        assert loop.submit(request("c", prompt_embeds=embeds(160), attempt=1)).accepted, "it was admitted elsewhere"
        held.set()
        await until(lambda: not loop._incoming)
        assert loop.submit(request("e", prompt_embeds=embeds(4))).accepted
