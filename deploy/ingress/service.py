"""What the HTTP routes do, without HTTP: turns requests into generations, and reports on the cluster."""

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

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
from deploy.ingress.json_pieces import join_pieces
from deploy.ingress.openai.answer_json import dump
from deploy.ingress.openai.choices import Choice, spell_prompt
from deploy.ingress.openai.embeds import FIELD, check_dimensions, check_width, embeddings_json, shaped
from deploy.ingress.openai.errors import (
    context_length_exceeded,
    invalid_request,
    model_not_found,
    unavailable,
)
from deploy.ingress.openai.messages import ChatFields, Message
from deploy.ingress.openai.parsing import check_content, parse_body
from deploy.ingress.openai.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    EmbeddingRequest,
)
from deploy.ingress.openai.sampling import check_limits, check_token_ids, to_sampling_params
from deploy.ingress.sandbox import Sandbox, rendering, sandboxed
from deploy.ingress.supervisor_link import SupervisorLink
from deploy.ingress.text.tokens import NO_TEMPLATE, Tokenizer, TooManyTokens
from deploy.ingress.tracing.request_trace import RequestTrace

T = TypeVar("T")
B = TypeVar("B", bound=BaseModel)

logger = logging.getLogger(__name__)

STARTING_PERIOD_S = 0.2
READY_PERIOD_S = 1.0
REFRESH_TIMEOUT_S = 5.0
# What grows with a request is done on the event loop only up to this many characters, tokens or bytes: longer work,
# which goes to a thread, would hold up everyone's streams. There it must not keep the interpreter's lock for long
# either, which json.loads() does with larger bodies: they are read in a sandbox.
LONG = 10_000
LARGE_BODY = 200_000
# To tokenise a character, or to spell a token, takes as long as to write so many; so many stand around a message.
ENCODED_CHARS, SPELT_CHARS, MESSAGE_CHARS = 10, 10, 50
NUMBER_CHARS = 10
# Texts in a request for embeddings, as OpenAI.
MAX_INPUTS = 2048
MAX_THREADS = 4


class Service:
    """One per ingress replica; belongs to its event loop. Raises ModelError if the tokenizer can't be loaded."""

    def __init__(self, config: ClusterConfig, model_dir: Path, supervisor: SupervisorLink) -> None:
        self.config = config
        self.model = read_spec(model_dir)
        self.tokenizer = Tokenizer.load(model_dir, config.chat_template)
        self.forms = AnswerForms(model_dir, self.tokenizer, config.tool_call_parser)
        self.max_model_len = max_model_len(config, self.model)
        self.metrics = Metrics()
        self.supervisor = supervisor
        self.started = int(time.time())
        self.ingress_id = f"ingress-{uuid.uuid4().hex[:8]}"
        self.client = FrontClient(self.ingress_id, self.metrics, config.max_num_waiting)
        self.state = ClusterState("starting", "starting", "")
        self._has_been_ready = False
        self._threads = ThreadPoolExecutor(MAX_THREADS, "requests")
        self._bodies = Sandbox("reading the body")
        template = self.tokenizer.template
        self._templates = Sandbox("messages: rendering the chat template", template.arguments()) if template else None
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
        self._check_fits(max(num_ids, default=0), "prompt")
        if isinstance(request, CompletionRequest):
            check_width(request.prompt_embeds, self.model.hidden_size)
            self._check_fits(max((embeds.shape[0] for embeds in request.prompt_embeds), default=0), FIELD)
        await self.run(sum(num_ids), lambda: check_limits(request, self.config, self.model.vocab_size))
        started = time.monotonic()
        prompts = await self._prompts(request)
        grammar = await self.forms.grammar(request, prompts[0])
        if trace:
            trace.tokenised(started)
        spelt = SPELT_CHARS * sum(map(len, prompts)) if request.is_echo else 0
        plans = await self.run(spelt, lambda: self._plans(request, prompts, grammar))
        if trace:
            trace.begin(request.n, [plan.choice for plan in plans], plans[0].params)
        # Without a front for the moment, requests wait for the one that is being restarted.
        if not self.state.is_serving:
            raise unavailable(f"The model is not ready: {self.state.phase}")
        generation = Generation(plans, self.client, self.metrics, request_id, trace, self.run)
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
                self._check_fits(len(ids), "input")
                check_token_ids(ids, self.model.vocab_size, "input")
        size = sum(map(len, request.input))
        prompts = [
            await self.encode(p, size=size, param="input") if isinstance(p, str) else tuple(p) for p in request.input
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

        return await self.run(NUMBER_CHARS * len(found) * self.model.hidden_size, answer)

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.config.model_name:
            raise model_not_found(name, self.config.model_name)

    async def warm_up(self) -> None:
        """Raises ModelError if the chat template can't be compiled."""
        if self._templates:
            await self._templates.warm_up()

    async def close(self) -> None:
        """Stop what was started here."""
        self._follow.cancel()
        await self._bodies.close()
        await self.forms.close()
        if self._templates:
            await self._templates.close()

    async def run(self, size: int, work: Callable[[], T]) -> T:
        """Do what takes as long as `size` is large, where it holds up nobody."""
        return work() if size < LONG else await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def parse(self, raw: bytes, model: type[B]) -> B:
        """A checked body. Raises APIError."""
        if len(raw) < LARGE_BODY:
            return await self.run(len(raw), lambda: parse_body(raw, model))
        pieces = await sandboxed(self._bodies.read_json(raw))
        return await self.run(len(raw), lambda: check_content(join_pieces(pieces), model, b"\\u" in raw))

    async def _prompts(self, request: CompletionRequest | ChatCompletionRequest) -> list[tuple[int, ...]]:
        if isinstance(request, ChatCompletionRequest):
            text = await self.render(request, request.messages, request.shown_tools)
            return [await self.encode(text, add_special_tokens=False, param="messages")]
        if request.prompt_embeds:
            return [(0,) * embeds.shape[0] for embeds in request.prompt_embeds]
        size = sum(map(len, request.prompt))
        return [await self.encode(p, size=size) if isinstance(p, str) else tuple(p) for p in request.prompt]

    async def render(self, fields: ChatFields, messages: list[Message], tools: list[dict[str, Any]]) -> str:
        """Raises APIError (400)."""
        if self._templates is None:
            raise invalid_request(NO_TEMPLATE, "messages")
        size = sum(MESSAGE_CHARS + len(message.content or "") for message in messages)
        # How much there is in tools, calls and variables is not counted: to count is as long as to write.
        is_nested = tools or fields.chat_template_kwargs or any(message.tool_calls for message in messages)
        options = {
            "add_generation_prompt": fields.add_generation_prompt,
            "continue_final_message": fields.continue_final_message,
            "variables": fields.chat_template_kwargs,
            "tools": tools,
        }
        asked = await self.run(
            LONG if is_nested else size, lambda: rendering([message.for_template() for message in messages], **options)
        )
        text = await sandboxed(self._templates.render(asked), "messages")
        return await self.run(len(text), text.decode)

    async def encode(
        self, text: str, add_special_tokens: bool = True, param: str = "prompt", size: int = 0, most: int = 0
    ) -> tuple[int, ...]:
        """`size`: characters of all texts that are encoded one after the other. Raises APIError (400) where there are
        more tokens than `most`, or than fit; before it has tokenised anything, if that is so whatever the tokens are.
        """
        self._check_fits(len(text) // self.tokenizer.longest_token, param)
        most = most or self.max_model_len
        try:
            return await self.run(
                ENCODED_CHARS * max(size, len(text)),
                lambda: tuple(self.tokenizer.encode(text, add_special_tokens, most)),
            )
        except TooManyTokens as error:
            raise context_length_exceeded(self.max_model_len, error.num_tokens, 0, param) from None

    async def decode(self, tokens: list[int]) -> str:
        """Raises APIError (400)."""
        if len(tokens) > self.max_model_len:
            limit = f"max_model_len={self.max_model_len}"
            raise invalid_request(f"tokens: {len(tokens)} token ids are more than {limit}: send fewer", "tokens")
        await self.run(len(tokens), lambda: check_token_ids(tokens, self.model.vocab_size, "tokens"))
        return await self.run(len(tokens), lambda: self.tokenizer.decode(tokens, skip_special_tokens=False))

    def _check_fits(self, least: int, param: str) -> None:
        """`least`: as many tokens as there must be."""
        if least > self.max_model_len:
            raise context_length_exceeded(self.max_model_len, least, 0, param)

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
