"""One request for embeddings: its texts, handed to fronts some at a time."""

import asyncio
from collections.abc import Sequence

from cluster.messages.requests import SamplingParams
from cluster.metrics import Metrics
from deploy.ingress.fronts.client import FrontClient
from deploy.ingress.generation import GenerationFailed, GenerationGivenUp

# Texts of one request that are computed at once; the others wait here, not in the fronts.
MAX_AT_ONCE = 32


async def embed(
    client: FrontClient, metrics: Metrics, prompts: Sequence[tuple[int, ...]], params: SamplingParams, request_id: str
) -> list[bytes]:
    """The pooled hidden states of each, float32. Raises GenerationFailed, Overloaded or Unavailable."""
    places = asyncio.Semaphore(MAX_AT_ONCE)

    async def one(index: int, prompt: tuple[int, ...]) -> bytes:
        async with places:
            stream = await client.submit(f"{request_id}-{index}", prompt, params)
            try:
                async for output in stream:
                    if output.error is not None and stream.is_given_up:
                        raise GenerationGivenUp(output.error)
                    if output.error is not None:
                        metrics.inc("requests_failed_total", reason="engine")
                        raise GenerationFailed(output.error)
                    if output.embedding is not None:
                        metrics.inc("request_success_total", finished_reason="length")
                        return output.embedding
            finally:
                stream.close()
        raise GenerationFailed("no embedding has come")

    works = [asyncio.create_task(one(index, prompt)) for index, prompt in enumerate(prompts)]
    try:
        return await asyncio.gather(*works)
    finally:  # with one, all end
        for work in works:
            work.cancel()
        await asyncio.gather(*works, return_exceptions=True)
