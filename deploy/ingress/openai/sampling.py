"""From a checked request to what the engine takes. Here everything is checked that depends on the model."""

import hashlib
import secrets
from collections.abc import Iterable, Sequence
from typing import Protocol

from cluster.messages.requests import SamplingParams
from deploy.ingress.openai.errors import context_length_exceeded, invalid_request
from deploy.ingress.openai.requests import ChatCompletionRequest, CompletionRequest, GenerationFields

DEFAULT_COMPLETION_TOKENS = 16
# Below it dividing by the temperature overflows; vLLM draws the same line.
GREEDY_BELOW = 1e-5

GenerationBody = CompletionRequest | ChatCompletionRequest


class Limits(Protocol):
    """The part of ClusterConfig that bounds a request."""

    @property
    def max_choices(self) -> int: ...
    @property
    def max_stop(self) -> int: ...
    @property
    def max_logprobs(self) -> int: ...


def to_sampling_params(
    request: GenerationBody,
    *,
    max_model_len: int,
    prompt_len: int,
    eos_token_ids: Sequence[int],
    vocab_size: int,
    choice_index: int = 0,
) -> SamplingParams:
    """Parameters of one choice, of a request that check_limits() has passed. `choice_index` counts the choices of one
    prompt (0 to n - 1), so that the answer to a prompt doesn't depend on the prompts beside it. Raises APIError (400).
    """
    max_tokens = _max_tokens(request, max_model_len, prompt_len)
    if request.min_tokens > max_tokens:
        raise invalid_request(f"min_tokens={request.min_tokens} is more than max_tokens={max_tokens}", "min_tokens")
    eos = () if request.ignore_eos else tuple(eos_token_ids)
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=request.temperature if request.temperature >= GREEDY_BELOW else 0.0,
        top_p=request.top_p,
        top_k=request.top_k if 0 < request.top_k < vocab_size else 0,
        min_p=request.min_p,
        seed=_choice_seed(request.seed, choice_index),
        min_tokens=request.min_tokens,
        stop_token_ids=tuple(dict.fromkeys((*eos, *request.stop_token_ids))),
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        repetition_penalty=request.repetition_penalty,
        logit_bias=tuple(request.logit_bias.items()),
        logprobs=request.num_logprobs,
        prompt_logprobs=_prompt_logprobs(request),
        return_routed_experts=request.return_routed_experts,
    )


def check_limits(request: GenerationBody, limits: Limits, vocab_size: int) -> None:
    """What can be refused before a prompt is tokenised: once for all its choices. Raises APIError (400)."""
    if request.num_choices > limits.max_choices:
        param = "n" if request.n > 1 else "prompt"
        message = (
            f"{param}: {request.num_choices} choices (n times prompts) are more than the server's {limits.max_choices}"
        )
        raise invalid_request(f"{message} (max_choices)", param)
    if len(request.stop) > limits.max_stop:
        raise invalid_request(
            f"stop: {len(request.stop)} strings are more than the server's {limits.max_stop} (max_stop)", "stop"
        )
    asked = {"prompt_logprobs": request.prompt_logprobs, _logprobs_field(request): request.num_logprobs}
    for param, count in asked.items():
        if count is not None and count > limits.max_logprobs:
            raise invalid_request(
                f"{param}={count} is more than the server's {limits.max_logprobs} (max_logprobs)", param
            )
    check_token_ids(request.stop_token_ids, vocab_size, "stop_token_ids")
    check_token_ids(request.logit_bias, vocab_size, "logit_bias")
    for prompt in request.prompt_token_ids:
        check_token_ids(prompt, vocab_size, "prompt")


def check_token_ids(ids: Iterable[int], vocab_size: int, param: str) -> None:
    """Raises APIError (400) that names the first id outside the vocabulary."""
    worst = max(ids, default=0)
    if worst >= vocab_size:
        raise invalid_request(
            f"{param}: token id {str(worst)[:20]} is outside the vocabulary: use 0 to {vocab_size - 1}", param
        )


def _max_tokens(request: GenerationBody, max_model_len: int, prompt_len: int) -> int:
    param = "prompt" if isinstance(request, CompletionRequest) else "messages"
    if prompt_len == 0:
        raise invalid_request(f"{param} has no tokens: there is nothing to continue", param)
    name, asked = _asked_tokens(request)
    room = max_model_len - prompt_len
    if room < (1 if asked is None else min(asked, 1)):
        raise context_length_exceeded(max_model_len, prompt_len, 1 if asked is None else asked, param)
    if asked is None:
        return room if isinstance(request, ChatCompletionRequest) else min(DEFAULT_COMPLETION_TOKENS, room)
    if asked > room:
        raise context_length_exceeded(max_model_len, prompt_len, asked, name)
    return asked


def _asked_tokens(request: GenerationBody) -> tuple[str, int | None]:
    if isinstance(request, ChatCompletionRequest) and request.max_completion_tokens is not None:
        return "max_completion_tokens", request.max_completion_tokens
    return "max_tokens", request.max_tokens


def _logprobs_field(request: GenerationFields) -> str:
    return "logprobs" if isinstance(request, CompletionRequest) else "top_logprobs"


def _prompt_logprobs(request: GenerationBody) -> int | None:
    """Echoed tokens carry log-probabilities like generated ones."""
    wanted = [request.prompt_logprobs, request.num_logprobs if request.is_echo else None]
    return max((count for count in wanted if count is not None), default=None)


def _choice_seed(seed: int | None, choice_index: int) -> int:
    """63 bits from the request's seed and the choice; without a seed they are random."""
    if seed is None:
        return secrets.randbits(63)
    digest = hashlib.blake2b(f"{seed}:{choice_index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
