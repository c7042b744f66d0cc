"""Streaming clients, and what they saw while something was broken under them."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx

from tests.e2e.servers import PLAIN, Server

# The longest stall that clients should see while something breaks. Printed, not asserted: machines differ.
AIM_S = 0.4
# A client gives up a stream that gives it nothing but pings, and waits so long after a failure before it asks again.
PATIENCE_S = 90.0
# Too long to be finished, so that its only effect is on which tokens there are to choose from.
LETTERS = "abcdefgh"
CONSTRAINED = f"[{LETTERS}]{{2000}}"
PAUSE_S = 0.2
# How long it pauses after an answer where that is asked for.
EASE_S = 1.0


@dataclass(slots=True)
class Stream:
    """One request after the other until told to stop. `stall` is the longest wait for a next event, in seconds;
    `num_broken` counts what ended early while connections were allowed to.
    """

    answers: list[list[int]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    num_broken: int = 0
    stall: float = 0.0
    num_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """A row of the table. Stalls are the longest waits for a next event without and with the fault, in seconds."""

    fault: str
    num_requests: int
    num_failed: int
    num_broken: int
    num_different: int
    usual_stall: float
    stall: float
    recovered: float  # throughput after healing, of that before the fault

    @property
    def aim(self) -> str:
        return "held" if self.stall <= AIM_S else f"missed by {self.stall - AIM_S:.2f} s"


def print_table(rows: list[Outcome]) -> None:
    width = max((len(row.fault) for row in rows), default=0)
    aim = f"aim {AIM_S:g} s"
    print(
        f"\n{'fault':{width}}  requests  failed  broken  tokens       usual stall  longest  {aim:16}  throughput after"
    )
    for row in rows:
        tokens = f"{row.num_different} differ" if row.num_different else "equal"
        print(
            f"{row.fault:{width}}  {row.num_requests:8d}  {row.num_failed:6d}  {row.num_broken:6d}  {tokens:11}"
            f"  {row.usual_stall:9.2f} s  {row.stall:5.2f} s  {row.aim:16}  {row.recovered:16.2f}"
        )


class Load:
    """`num_clients` threads that stream the same greedy request again and again. Those with the last prompt ask for an
    answer that keeps to CONSTRAINED.

    Their request ids are as unlucky as can be: two clients share each, and all begin alike.
    """

    def __init__(
        self, server: Server, num_clients: int, tokens: int, prompts: list[list[int]], num_choices: int = 1
    ) -> None:
        self.streams = [Stream() for _ in range(num_clients)]
        self._num_choices = num_choices
        self._stop = threading.Event()
        self._is_eased = threading.Event()
        self._may_break = threading.Event()
        body = {"max_tokens": tokens, "temperature": 0, "n": num_choices, "stream": True, "return_token_ids": True}
        kinds = [{"ignore_eos": True}] * (len(prompts) - 1) + [{"structured_outputs": {"regex": CONSTRAINED}}]
        bodies = [body | kind | {"prompt": prompt} for kind, prompt in zip(kinds, prompts, strict=True)]
        self._threads = [
            threading.Thread(
                target=self._run,
                args=(server.url, f"team/{i // 2}", stream, bodies[i % len(bodies)]),
                daemon=True,
            )
            for i, stream in enumerate(self.streams)
        ]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        deadline = time.monotonic() + PATIENCE_S + 30
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            assert not thread.is_alive(), "a stream never ended"

    @contextmanager
    def breaking(self, is_allowed: bool) -> Iterator[None]:
        """Requests may meanwhile end with an error or a lost connection, as far as allowed; but end they must."""
        if is_allowed:
            self._may_break.set()
        yield
        self._may_break.clear()

    @contextmanager
    def eased(self) -> Iterator[None]:
        """Clients meanwhile pause after each answer: they would take all that the processors have left from the
        processes that are starting.
        """
        self._is_eased.set()
        yield
        self._is_eased.clear()

    def wait_for(self, num_answers: int) -> None:
        """Until every client has got this many more answers."""
        wanted = [len(stream.answers) + num_answers for stream in self.streams]
        deadline = time.monotonic() + PATIENCE_S + 30
        while any(len(s.answers) < n and not s.errors for s, n in zip(self.streams, wanted, strict=True)):
            assert time.monotonic() < deadline, "the load makes no progress"
            time.sleep(0.02)

    def throughput(self, seconds: float) -> float:
        """Tokens per second, over the next so many seconds."""
        before, started = self._num_tokens(), time.monotonic()
        time.sleep(seconds)
        return (self._num_tokens() - before) / (time.monotonic() - started)

    def _num_tokens(self) -> int:
        return sum(stream.num_tokens for stream in self.streams)

    def take_stall(self) -> float:
        """The longest stall since the last call."""
        longest = max(stream.stall for stream in self.streams)
        for stream in self.streams:
            stream.stall = 0.0
        return longest

    def outcome(
        self, fault: str, expected: list[list[int]], usual_stall: float, stall: float, recovered: float
    ) -> Outcome:
        different = sum(
            answer != expected[i % len(expected)] for i, stream in enumerate(self.streams) for answer in stream.answers
        )
        num_answers = sum(len(stream.answers) for stream in self.streams)
        num_broken = sum(stream.num_broken for stream in self.streams)
        num_requests = num_answers // self._num_choices + num_broken + len(self.errors)
        return Outcome(fault, num_requests, len(self.errors), num_broken, different, usual_stall, stall, recovered)

    def check(self, expected: list[list[int]]) -> None:
        """No request has failed, and every answer is the expected one of its prompt."""
        assert not self.errors, self.errors[:5]
        for i, stream in enumerate(self.streams):
            assert all(answer == expected[i % len(expected)] for answer in stream.answers), f"client {i}"

    @property
    def errors(self) -> list[str]:
        return [error for stream in self.streams for error in stream.errors]

    def _run(self, url: str, request_id: str, stream: Stream, body: dict[str, object]) -> None:
        headers = {"X-Request-Id": request_id}
        with httpx.Client(base_url=url, headers=headers, timeout=PATIENCE_S, **PLAIN) as client:
            while not self._stop.is_set():
                try:
                    stream.answers += self._one(client, stream, body)
                    if self._is_eased.is_set():
                        self._stop.wait(EASE_S)
                except Exception as error:
                    is_hang = isinstance(error, TimeoutError | httpx.TimeoutException)
                    if self._may_break.is_set() and not is_hang:
                        stream.num_broken += 1
                    else:
                        stream.errors.append(f"{type(error).__name__}: {error}")
                    self._stop.wait(PAUSE_S)

    def _one(self, client: httpx.Client, stream: Stream, body: dict[str, object]) -> list[list[int]]:
        """Token ids of each choice."""
        ids: list[list[int]] = [[] for _ in range(self._num_choices)]
        last = time.monotonic()
        with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                raise RuntimeError(f"{response.status_code}: {response.read()!r}")
            for line in response.iter_lines():
                now = time.monotonic()
                stream.stall = max(stream.stall, now - last)
                if not line.startswith("data: "):
                    if now - last > PATIENCE_S:
                        raise TimeoutError(f"nothing but pings for {PATIENCE_S:g} s")
                    continue
                last = now
                if line == "data: [DONE]":
                    return ids
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise RuntimeError(event["error"]["message"])
                choice = event["choices"][0]
                ids[choice["index"]] += choice["token_ids"]
                stream.num_tokens += len(choice["token_ids"])
        raise RuntimeError("the stream ended without [DONE]")
