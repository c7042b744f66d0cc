"""A server with a small token budget and a small KV cache: who waits for whom, and what answers say of it."""

import asyncio

import httpx
import pytest
from openai import OpenAI

from tests.e2e.servers import MODEL, Server


@pytest.fixture(scope="module")
def server(watched: Server) -> Server:
    return watched


def prompt(number: int, length: int) -> list[int]:
    return [(17 * number + 7 * i + i * i * number) % 250 for i in range(length)]


def test_a_short_prompt_does_not_wait_for_long_ones(server: Server) -> None:
    """By the order of first tokens, of prompts that are submitted together: no clock is read."""
    prompts = [*(prompt(i, 1500) for i in range(3)), prompt(9, 30)]
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        events = client.completions.create(model=MODEL, prompt=prompts, max_tokens=1, temperature=0, stream=True)
        order = list(dict.fromkeys(event.choices[0].index for event in events if event.choices))
    assert sorted(order) == [0, 1, 2, 3]
    assert order[-1] != 3, "a short prompt was read last"


async def test_cached_tokens_never_exceed_the_prompt(server: Server) -> None:
    async def ask(client: httpx.AsyncClient, number: int) -> httpx.Response:
        body = {"prompt": prompt(number, 11), "max_tokens": 300, "temperature": 0, "ignore_eos": True}
        return await client.post("/v1/completions", json=body)

    hits = server.metric("prefix_cache_hits_total")
    async with httpx.AsyncClient(base_url=server.url, timeout=60, trust_env=False) as client:
        answers = await asyncio.gather(*(ask(client, 20 + i) for i in range(24)))
    usages = [answer.json()["usage"] for answer in answers]
    assert server.metric("num_preemptions_total") > 0, "the test is meant to preempt"
    assert {usage["completion_tokens"] for usage in usages} == {300}
    assert {usage["prompt_tokens_details"]["cached_tokens"] for usage in usages} == {0}
    assert server.metric("prefix_cache_hits_total") == hits
