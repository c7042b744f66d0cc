"""Streaming clients, and what they saw while something was broken under them."""

import json
import threading
import time
from dataclasses import dataclass, field

import httpx

from tests.e2e.servers import Server


@dataclass(slots=True)
class Stream:
    """One request after the other until told to stop. `stall` is the longest wait for a next event, in seconds."""

    answers: list[list[int]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    stall: float = 0.0
    num_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """A row of the table. Stalls are the longest waits for a next event without and with the fault, in seconds."""

    fault: str
    num_requests: int
    num_failed: int
    usual_stall: float
    stall: float
    recovered: float  # throughput after healing, of that before the fault


def print_table(rows: list[Outcome]) -> None:
    width = max((len(row.fault) for row in rows), default=0)
    print(f"\n{'fault':{width}}  requests  failed  usual stall  longest  extra  throughput after")
    for row in rows:
        extra = max(0.0, row.stall - row.usual_stall)
        print(
            f"{row.fault:{width}}  {row.num_requests:8d}  {row.num_failed:6d}  {row.usual_stall:9.2f} s"
            f"  {row.stall:5.2f} s {extra:5.2f} s  {row.recovered:10.2f}"
        )


class Load:
    """`num_clients` threads that stream the same greedy request again and again."""

    def __init__(self, server: Server, num_clients: int, tokens: int, prompts: list[list[int]]) -> None:
        self.streams = [Stream() for _ in range(num_clients)]
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(server.url, stream, prompts[i % len(prompts)], tokens))
            for i, stream in enumerate(self.streams)
        ]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive(), "a stream never ended"

    def wait_for(self, num_answers: int) -> None:
        """Until every client has got this many more answers."""
        wanted = [len(stream.answers) + num_answers for stream in self.streams]
        deadline = time.monotonic() + 120
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

    def check(self, expected: list[list[int]]) -> None:
        """No request has failed, and every answer is the expected one of its prompt."""
        assert not self.errors, self.errors[:5]
        for i, stream in enumerate(self.streams):
            assert all(answer == expected[i % len(expected)] for answer in stream.answers), f"client {i}"

    @property
    def num_requests(self) -> int:
        return sum(len(stream.answers) + len(stream.errors) for stream in self.streams)

    @property
    def errors(self) -> list[str]:
        return [error for stream in self.streams for error in stream.errors]

    def _run(self, url: str, stream: Stream, prompt: list[int], tokens: int) -> None:
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        body |= {"stream": True, "return_token_ids": True}
        with httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
            while not self._stop.is_set():
                try:
                    stream.answers.append(self._one(client, stream, body))
                except Exception as error:
                    stream.errors.append(f"{type(error).__name__}: {error}")

    def _one(self, client: httpx.Client, stream: Stream, body: dict[str, object]) -> list[int]:
        ids: list[int] = []
        last = time.monotonic()
        with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                raise RuntimeError(f"{response.status_code}: {response.read()!r}")
            for line in response.iter_lines():
                if not line.startswith("data: "):
                    continue
                now = time.monotonic()
                stream.stall, last = max(stream.stall, now - last), now
                if line == "data: [DONE]":
                    return ids
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise RuntimeError(event["error"]["message"])
                ids += event["choices"][0]["token_ids"]
                stream.num_tokens += len(event["choices"][0]["token_ids"])
        raise RuntimeError("the stream ended without [DONE]")
