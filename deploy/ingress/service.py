"""What the HTTP routes do, without HTTP: turns requests into generations, and reports on the cluster."""

import asyncio
import logging
import time
import uuid
from dataclasses import replace
from pathlib import Path

from cluster.config import ClusterConfig
from cluster.messages.requests import SamplingParams
from cluster.messages.state import ClusterState
from cluster.metrics import Metrics
from cluster.models.family import read_spec
from cluster.policy.blueprint import max_model_len
from deploy.ingress.answer_forms import AnswerForms
from deploy.ingress.embedding import embed
from deploy.ingress.fronts.client import FrontClient
from deploy.ingress.generation import Generation, Plan
from deploy.ingress.openai.answer_json import dump
from deploy.ingress.openai.choices import Choice, spell_prompt
from deploy.ingress.openai.embeds import FIELD, check_dimensions, check_width, embeddings_json, shaped
from deploy.ingress.openai.errors import (
    invalid_request,
    model_not_found,
    unavailable,
)
from deploy.ingress.openai.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    EmbeddingRequest,
)
from deploy.ingress.openai.sampling import check_limits, check_token_ids, to_sampling_params
from deploy.ingress.supervisor_link import SupervisorLink
from deploy.ingress.text.tokens import Tokenizer
from deploy.ingress.tracing.request_trace import RequestTrace
from deploy.ingress.work import Work

logger = logging.getLogger(__name__)

STARTING_PERIOD_S = 0.2
READY_PERIOD_S = 1.0
REFRESH_TIMEOUT_S = 5.0
# Texts in a request for embeddings, as OpenAI.
MAX_INPUTS = 2048
# To spell a token takes as long as to write so many characters, and so does a number.
SPELT_CHARS, NUMBER_CHARS = 10, 10


class Service:
    """One per ingress replica; belongs to its event loop. Raises ModelError if the tokenizer can't be loaded."""

    def __init__(self, config: ClusterConfig, model_dir: Path, supervisor: SupervisorLink) -> None:
        self.config = config
        self.model = read_spec(model_dir)
        self.tokenizer = Tokenizer.load(model_dir, config.chat_template)
        self.forms = AnswerForms(model_dir, self.tokenizer, config.tool_call_parser)
        self.max_model_len = max_model_len(config, self.model)
        self.work = Work(self.tokenizer, self.max_model_len, self.model.vocab_size)
        self.metrics = Metrics()
        self.supervisor = supervisor
        self.started = int(time.time())
        self.ingress_id = f"ingress-{uuid.uuid4().hex[:8]}"
        self.client = FrontClient(self.ingress_id, self.metrics, config.max_num_waiting)
        self.state = ClusterState("starting", "starting", "")
        self._has_been_ready = False
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
        self._has_been_ready |= self.is_ready

    @property
    def is_ready(self) -> bool:
        """True if a generation could succeed now."""
        return self.state.is_serving and self.client.is_available

    @property
    def takes_requests(self) -> bool:
        """True from the first time that a generation could succeed until the cluster ends: while no front is there,
        requests wait for one.
        """
        return self.state.is_serving and (self._has_been_ready or self.client.is_available)

    async def generate(
        self,
        request: CompletionRequest | ChatCompletionRequest,
        request_id: str,
        trace: RequestTrace | None = None,
    ) -> Generation:
        """Check, tokenise and submit. Raises APIError, Overloaded or Unavailable."""
        self.check_model(request.model)
        num_ids = [len(ids) for ids in request.prompt_token_ids]
        self.work.check_fits(max(num_ids, default=0), "prompt")
        if isinstance(request, CompletionRequest):
            check_width(request.prompt_embeds, self.model.hidden_size)
            self.work.check_fits(max((embeds.shape[0] for embeds in request.prompt_embeds), default=0), FIELD)
        await self.work.run(sum(num_ids), lambda: check_limits(request, self.config, self.model.vocab_size))
        started = time.monotonic()
        prompts = await self._prompts(request)
        grammar = await self.forms.grammar(request, prompts[0])
        if trace:
            trace.tokenised(started)
        spelt = SPELT_CHARS * sum(map(len, prompts)) if request.is_echo else 0
        plans = await self.work.run(spelt, lambda: self._plans(request, prompts, grammar))
        if trace:
            trace.begin(request.n, [plan.choice for plan in plans], plans[0].params)
        # Without a front for the moment, requests wait for the one that is being restarted.
        if not self.state.is_serving:
            raise unavailable(f"The model is not ready: {self.state.phase}")
        generation = Generation(plans, self.client, self.metrics, request_id, trace, self.work.run)
        await generation.submit()
        return generation

    async def embed(self, request: EmbeddingRequest, request_id: str) -> bytes:
        """The answer as JSON. Raises APIError, GenerationFailed, Overloaded or Unavailable."""
        self.check_model(request.model)
        check_dimensions(request.dimensions, self.model.hidden_size)
        if len(request.input) > MAX_INPUTS:
            raise invalid_request(f"input: {len(request.input)} texts are more than {MAX_INPUTS}", "input")
        for ids in request.input:
            if not isinstance(ids, str):
                self.work.check_fits(len(ids), "input")
                check_token_ids(ids, self.model.vocab_size, "input")
        size = sum(map(len, request.input))
        prompts = [
            await self.work.encode(p, size=size, param="input") if isinstance(p, str) else tuple(p)
            for p in request.input
        ]
        if not all(prompts):
            raise invalid_request("input holds a text without tokens: there is nothing to embed", "input")
        if not self.state.is_serving:
            raise unavailable(f"The model is not ready: {self.state.phase}")
        params = SamplingParams(max_tokens=0, pooling=request.pooling)
        found = await embed(self.client, self.metrics, prompts, params, request_id)

        def answer() -> bytes:
            vectors = [shaped(each, request.dimensions, request.normalize) for each in found]
            is_base64, num_tokens = request.encoding_format == "base64", sum(map(len, prompts))
            return dump(embeddings_json(vectors, is_base64, self.config.model_name, num_tokens))

        return await self.work.run(NUMBER_CHARS * len(found) * self.model.hidden_size, answer)

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.config.model_name:
            raise model_not_found(name, self.config.model_name)

    async def warm_up(self) -> None:
        """Raises ModelError if the chat template can't be compiled."""
        await self.work.warm_up()

    async def close(self) -> None:
        """Stop what was started here."""
        self._follow.cancel()
        await self.work.close()
        await self.forms.close()

    async def _prompts(self, request: CompletionRequest | ChatCompletionRequest) -> list[tuple[int, ...]]:
        if isinstance(request, ChatCompletionRequest):
            text = await self.work.render(request, request.messages, request.shown_tools)
            return [await self.work.encode(text, add_special_tokens=False, param="messages")]
        if request.prompt_embeds:
            return [(0,) * embeds.shape[0] for embeds in request.prompt_embeds]
        size = sum(map(len, request.prompt))
        return [await self.work.encode(p, size=size) if isinstance(p, str) else tuple(p) for p in request.prompt]

    def _plans(
        self,
        request: CompletionRequest | ChatCompletionRequest,
        prompts: list[tuple[int, ...]],
        grammar: str | None,
    ) -> list[Plan]:
        plans: list[Plan] = []
        for prompt in prompts:
            echoed = spell_prompt(prompt, self.tokenizer) if request.is_echo else []
            plans += [self._plan(request, prompt, echoed, len(plans) + n, n, grammar) for n in range(request.n)]
        return plans

    def _plan(
        self,
        request: CompletionRequest | ChatCompletionRequest,
        prompt: tuple[int, ...],
        echoed: list[str],
        index: int,
        n: int,
        grammar: str | None,
    ) -> Plan:
        params = to_sampling_params(
            request,
            max_model_len=self.max_model_len,
            prompt_len=len(prompt),
            eos_token_ids=self.model.eos_token_ids,
            vocab_size=self.model.vocab_size,
            choice_index=n,
        )
        params = replace(params, grammar=grammar)
        choice = Choice(
            index,
            request,
            params,
            prompt,
            self.tokenizer,
            self.model.eos_token_ids,
            echoed,
            thoughts=self.forms.splitter(request, prompt),
            calls=self.forms.call_parser(request),
        )
        embeds = request.prompt_embeds if isinstance(request, CompletionRequest) else []
        return Plan(choice, prompt, params, embeds[index // request.n] if embeds else None)
