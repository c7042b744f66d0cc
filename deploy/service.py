"""What the HTTP routes do, without HTTP: turns requests into generations, and reports on the cluster."""

import asyncio
import logging
import time
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from cluster.blueprint import max_model_len
from cluster.config import ClusterConfig
from cluster.messages import ClusterState, RebalanceReport, Wanted
from cluster.metrics import Metrics
from cluster.model_config import read_model_config
from deploy.front_client import FrontClient
from deploy.generation import Generation, Plan
from deploy.openai.chat_template import ChatTemplateError
from deploy.openai.choices import Choice
from deploy.openai.errors import context_length_exceeded, invalid_request, model_not_found, unavailable
from deploy.openai.requests import ChatCompletionRequest, CompletionRequest, Message
from deploy.openai.sampling import check_limits, to_sampling_params
from deploy.request_trace import RequestTrace
from deploy.text import Tokenizer

logger = logging.getLogger(__name__)

STARTING_PERIOD_S = 0.2
READY_PERIOD_S = 1.0
# "recovering": there may be no front for the moment, or the supervisor may not know yet which there are.
SERVING = ("ready", "degraded", "recovering")
REFRESH_TIMEOUT_S = 5.0
# Longer texts are tokenised in a thread, so that they don't hold up everyone's streams.
LONG_TEXT = 10_000


class SupervisorLink(Protocol):
    """What an ingress asks of the supervisor; deploy/app.py connects it."""

    async def push_samples(self, ingress_id: str, samples: tuple[Any, ...]) -> ClusterState: ...
    async def exposition(self, ingress_id: str, samples: tuple[Any, ...]) -> bytes: ...
    async def experts(self) -> dict[str, Any]: ...
    async def scale(self, fronts: int | None, group: int | None, replicas: int | None) -> Wanted: ...
    async def rebalance(self, dry_run: bool, force: bool) -> RebalanceReport: ...


class Service:
    """One per ingress replica; belongs to its event loop. Raises ModelError if the tokenizer can't be loaded."""

    def __init__(self, config: ClusterConfig, model_dir: Path, supervisor: SupervisorLink) -> None:
        self.config = config
        self.model = read_model_config(model_dir)
        self.tokenizer = Tokenizer.load(model_dir, config.chat_template)
        self.max_model_len = max_model_len(config, self.model)
        self.metrics = Metrics()
        self.supervisor = supervisor
        self.started = int(time.time())
        self.ingress_id = f"ingress-{uuid.uuid4().hex[:8]}"
        self.client = FrontClient(self.ingress_id, self.metrics, config.max_num_waiting)
        self.state = ClusterState("starting", "starting", "")
        self._follow = asyncio.create_task(self._follow_state())

    async def _follow_state(self) -> None:
        """Keep the supervisor's view of the cluster here, so that no request has to ask for it."""
        while True:
            await self.refresh()
            await asyncio.sleep(READY_PERIOD_S if self.is_ready else STARTING_PERIOD_S)

    async def refresh(self) -> None:
        """Learn the state of the cluster now. If the supervisor is silent, the actors last known go on serving."""
        try:
            async with asyncio.timeout(REFRESH_TIMEOUT_S):
                self.state = await self.supervisor.push_samples(self.ingress_id, self.metrics.samples())
            if self.state.fronts or self.state.state != "recovering":
                self.client.update(self.state)  # a supervisor that has just been restarted may not know the fronts yet
        except Exception as error:
            logger.warning("the supervisor does not answer: %s", error or "timeout")
            if self.state.state == "ready":
                self.state = replace(self.state, state="degraded", phase="the supervisor does not answer")

    @property
    def is_ready(self) -> bool:
        """True if a generation could succeed now."""
        return self.state.state in SERVING and self.client.is_available

    async def generate(
        self,
        request: CompletionRequest | ChatCompletionRequest,
        request_id: str,
        trace: RequestTrace | None = None,
    ) -> Generation:
        """Check, tokenise and submit. Raises APIError, Overloaded or Unavailable."""
        self.check_model(request.model)
        check_limits(request, self.config, self.model.vocab_size)
        started = time.monotonic()
        prompts = await self._prompts(request)
        if trace:
            trace.tokenised(started)
        plans = [self._plan(request, prompt, at, n) for at, prompt in enumerate(prompts) for n in range(request.n)]
        if trace:
            trace.begin(request.n, [plan.choice for plan in plans], plans[0].params)
        # Without a front for the moment, requests wait for the one that is being restarted.
        if self.state.state not in SERVING:
            raise unavailable(f"The model is not ready: {self.state.phase}")
        generation = Generation(plans, self.client, self.metrics, request_id, trace)
        await generation.submit()
        return generation

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.config.model_name:
            raise model_not_found(name, self.config.model_name)

    async def _prompts(self, request: CompletionRequest | ChatCompletionRequest) -> list[tuple[int, ...]]:
        if isinstance(request, ChatCompletionRequest):
            text = self.render(request.messages, request.add_generation_prompt, request.continue_final_message)
            return [await self.encode(text, add_special_tokens=False, param="messages")]
        return [await self.encode(p) if isinstance(p, str) else tuple(p) for p in request.prompt]

    def render(self, messages: list[Message], add_generation_prompt: bool, continue_final_message: bool) -> str:
        try:
            return self.tokenizer.render_chat(
                [message.for_template() for message in messages],
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )
        except ChatTemplateError as error:
            raise invalid_request(str(error), "messages") from None

    async def encode(self, text: str, add_special_tokens: bool = True, param: str = "prompt") -> tuple[int, ...]:
        """Raises APIError (400), before it has tokenised anything, if the text can't fit whatever its tokens are."""
        least = len(text) // self.tokenizer.longest_token
        if least > self.max_model_len:
            raise context_length_exceeded(self.max_model_len, least, 0, param)
        if len(text) < LONG_TEXT:
            return tuple(self.tokenizer.encode(text, add_special_tokens))
        return tuple(await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens))

    def _plan(
        self,
        request: CompletionRequest | ChatCompletionRequest,
        prompt: tuple[int, ...],
        at: int,
        n: int,
    ) -> Plan:
        params = to_sampling_params(
            request,
            max_model_len=self.max_model_len,
            prompt_len=len(prompt),
            eos_token_ids=self.model.eos_token_ids,
            vocab_size=self.model.vocab_size,
            limits=self.config,
            choice_index=n,
        )
        choice = Choice(at * request.n + n, request, params, prompt, self.tokenizer, self.model.eos_token_ids)
        return Plan(choice, prompt, params)
