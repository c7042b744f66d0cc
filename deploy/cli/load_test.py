"""Concurrent streams against a server, and what they saw. Used by `outcrop bench` and by benchmarks/serving.py."""

import asyncio
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

TIMEOUT_S = 600.0


@dataclass(slots=True)
class Results:
    """Times in seconds: of the whole run; until each request's first token; between tokens; of each request."""

    seconds: float = 0.0
    num_tokens: int = 0
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` of the values don't exceed; nan if there are none."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)] if values else math.nan


async def stream_all(
    url: str,
    prompts: Sequence[Sequence[int]],
    output_len: int,
    concurrency: int | None = None,
    headers: dict[str, str] | None = None,
) -> Results:
    """Send each prompt (token ids) as a greedy, streaming request for exactly `output_len` tokens, at most
    `concurrency` at a time.
    """
    results, places = Results(), asyncio.Semaphore(concurrency or len(prompts))
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=url, timeout=TIMEOUT_S, trust_env=False, limits=limits, headers=headers
    ) as client:

        async def one(prompt: Sequence[int]) -> None:
            async with places:
                try:
                    await _stream(client, results, prompt, output_len)
                except (httpx.HTTPError, RuntimeError) as error:
                    results.errors.append(str(error) or type(error).__name__)

        started = time.perf_counter()
        await asyncio.gather(*map(one, prompts))
        results.seconds = time.perf_counter() - started
    return results


async def _stream(client: httpx.AsyncClient, results: Results, prompt: Sequence[int], output_len: int) -> None:
    body: dict[str, Any] = {"prompt": list(prompt), "max_tokens": output_len, "temperature": 0, "ignore_eos": True}
    started = last = time.perf_counter()
    is_first = True
    async with client.stream(
        "POST", "/v1/completions", json=body | {"stream": True, "return_token_ids": True}
    ) as answer:
        if answer.status_code != 200:
            raise RuntimeError(f"{answer.status_code}: {(await answer.aread()).decode(errors='replace')}")
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            now = time.perf_counter()
            (results.first if is_first else results.between).append(now - last)
            last, is_first = now, False
            results.num_tokens += sum(len(choice["token_ids"]) for choice in event["choices"])
    results.whole.append(time.perf_counter() - started)
