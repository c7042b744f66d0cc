"""Outputs of one sequence on their way from fronts to the request that waits for them. Knows no Ray."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

from cluster.messages.requests import GenerationRequest, RequestOutput, TokenLogprob


class OutputStream:
    """Outputs of one sequence until it finishes. close() early, and the sequence is aborted."""

    def __init__(self, request: GenerationRequest) -> None:
        self.request = request
        self.cost = len(request.prompt_token_ids) + request.params.max_tokens
        self.is_complete = False  # its last output has come
        self.is_finished = False  # and has been read
        self.is_closed = False
        self.is_given_up = False  # no front has come back for it
        self.num_losses = 0
        self.on_close: Callable[[], None] | None = None
        self.front, self.offered = "", 0.0  # which it was last offered to, and when
        self._emitted = list(request.output_token_ids)
        self._scores: list[TokenLogprob | None] = []  # parts of what the first output will bring
        self._queue: asyncio.Queue[RequestOutput] = asyncio.Queue()

    def put(self, output: RequestOutput) -> None:
        if output.prompt_logprobs:
            self._scores += output.prompt_logprobs
        if output.is_part:
            return
        if self._scores:
            output, self._scores = replace(output, prompt_logprobs=tuple(self._scores)), []
        self._emitted += output.token_ids
        self.is_complete = output.finish_reason is not None
        self._queue.put_nowait(output)

    def fail(self, error: str) -> None:
        self.put(RequestOutput(self.request.request_id, finish_reason="error", error=error))

    def next_offer(self, request_id: str, lease: str) -> GenerationRequest:
        """The request as it is offered now: it continues what was emitted. Late outputs of an older offer have another
        id, so they don't fit it.
        """
        self._scores = []
        self.request = replace(self.request, request_id=request_id, lease=lease, output_token_ids=tuple(self._emitted))
        return self.request

    def renew(self) -> None:
        """The front that had it is lost."""
        self.request = replace(self.request, attempt=self.request.attempt + 1)

    def __aiter__(self) -> "OutputStream":
        return self

    async def __anext__(self) -> RequestOutput:
        if self.is_finished:
            raise StopAsyncIteration
        output = await self._queue.get()
        self.is_finished = output.finish_reason is not None
        return output

    def close(self) -> None:
        """Safe to call at any time, any number of times."""
        self.is_closed = True
        on_close, self.on_close = self.on_close, None
        if on_close:
            on_close()
