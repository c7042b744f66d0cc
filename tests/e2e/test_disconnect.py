"""A client that goes away takes its sequences with it: they are aborted within a step and give back their KV blocks."""

import json
import time
from contextlib import suppress
from typing import Any

import httpx
import pytest
from openai import APITimeoutError, OpenAI

from tests.e2e.servers import MODEL, Server, eventually

# Runs for more than 10 s if nobody stops it.
LONG: dict[str, Any] = {"prompt": "Hi", "max_tokens": 2000, "temperature": 0, "ignore_eos": True}
LONG_MESSAGES: Any = [{"role": "user", "content": "Hi"}]
# Far below the time that LONG takes, far above that of a step.
MOMENT_S = 4.0


@pytest.fixture(autouse=True)
def _idle(server: Server) -> None:
    server.wait_idle()


def aborted(server: Server) -> float:
    return server.metric("request_success_total", finished_reason="abort")


def check_stopped(server: Server, num_aborted_before: float, num_sequences: int = 1) -> None:
    server.wait_idle(MOMENT_S)
    assert aborted(server) == num_aborted_before + num_sequences
    tokens = server.metric("generation_tokens_total")
    time.sleep(0.5)
    assert server.metric("generation_tokens_total") == tokens, "still generating"


@pytest.mark.parametrize("num_choices", [1, 4])
def test_leaving_a_stream_aborts_all_its_choices(server: Server, http: httpx.Client, num_choices: int) -> None:
    before = aborted(server)
    with http.stream("POST", "/v1/completions", json=LONG | {"stream": True, "n": num_choices}) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: {")
        eventually(lambda: server.metric("num_requests_running") == num_choices, "all run", MOMENT_S)
        assert server.metric("kv_cache_usage_ratio") > 0
    check_stopped(server, before, num_choices)


def test_leaving_at_any_moment(server: Server, http: httpx.Client) -> None:
    """An abort must not get lost in whatever the request is doing when it is cancelled."""
    before = aborted(server)
    for num_lines in range(10):
        with http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as response:
            lines = response.iter_lines()
            for _ in range(num_lines):
                next(lines)
        server.wait_idle(MOMENT_S)
    assert aborted(server) == before + 10


def test_closing_the_stream_of_the_openai_client(server: Server, client: OpenAI) -> None:
    before = aborted(server)
    stream = client.chat.completions.create(
        model=MODEL, messages=LONG_MESSAGES, max_tokens=1900, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    check_stopped(server, before)


@pytest.mark.parametrize("num_choices", [1, 4])
def test_a_client_that_gives_up_waiting_for_a_whole_answer(server: Server, num_choices: int) -> None:
    before = aborted(server)
    with suppress(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json=LONG | {"n": num_choices}, timeout=1.5, trust_env=False)
        raise AssertionError("the answer came in time: the request is too short for this test")
    check_stopped(server, before, num_choices)


def test_a_timeout_of_the_openai_client(server: Server, client: OpenAI) -> None:
    before = aborted(server)
    with pytest.raises(APITimeoutError):
        client.with_options(timeout=1.5).completions.create(
            model=MODEL, max_tokens=2000, prompt="Hi", extra_body={"ignore_eos": True}
        )
    check_stopped(server, before)


def test_who_stays_is_not_disturbed(server: Server, http: httpx.Client) -> None:
    body = {"prompt": "Stay", "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    alone = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
    with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as stays:
        with http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as leaves:
            next(leaves.iter_lines())
        chunks = [json.loads(line[6:]) for line in stays.iter_lines() if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == alone
    server.wait_idle(MOMENT_S)
