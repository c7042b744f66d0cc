"""A sequence on its way: what an ingress asks of a front, and what comes back.

Token ids are plain ints, times are seconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]
PoolingKind = Literal["last", "mean"]
EmbedsDtype = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one sequence is continued. Every field has been validated at the ingress.

    temperature 0 is greedy. top_k 0, top_p 1, min_p 0 and penalties 0 (repetition: 1) switch a rule off.
    `stop_token_ids` ends the sequence; it already holds the model's end-of-sequence ids unless the request
    said ignore_eos. They can't be sampled before `min_tokens` tokens. `logprobs` is the number of
    alternatives reported per token (0: the token itself only); None reports nothing. `grammar` is what the output keeps
    to, in llguidance's form (cluster/models/grammars.py). `pooling` asks for the pooled hidden states of the prompt,
    which come with the only output; max_tokens is 0 then.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    return_routed_experts: bool = False
    grammar: str | None = None
    pooling: PoolingKind | None = None


@dataclass(frozen=True, slots=True)
class PromptEmbeds:
    """Embeddings in place of a prompt's tokens, in C order; multiplied by what a model multiplies its own by."""

    shape: tuple[int, int]
    dtype: EmbedsDtype
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One sequence to continue, as it is offered to one front.

    `request_id` is the ingress's own, another one for each offer, and never parsed; `label` is what people call the
    request, for log lines, and may be anything a client chose. Outputs go to the mailbox of `lease`.
    `output_token_ids` are tokens that an earlier front has already emitted; `attempt` counts the fronts that have lost
    the sequence. Outputs of a traced request carry a Timing. With `prompt_embeds` the prompt's ids are placeholders.
    """

    request_id: str
    lease: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    output_token_ids: tuple[int, ...] = ()
    is_traced: bool = False
    label: str = ""
    attempt: int = 0
    prompt_embeds: PromptEmbeds | None = None

    @property
    def is_replay(self) -> bool:
        return self.attempt > 0 or bool(self.output_token_ids)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of a token under the model's own distribution, before penalties and temperature.

    `rank` counts from 1 (the most likely token). `top` lists the most likely (token id, logprob), best first.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class RoutedExperts:
    """Which experts computed tokens of a sequence: uint8 or int16 numbers in C order, shape (tokens, layers, top_k).

    `first` is the position of the first of these tokens.
    """

    shape: tuple[int, int, int]
    dtype: str
    data: bytes
    first: int = 0

    @classmethod
    def joined(cls, pieces: "Sequence[RoutedExperts]") -> "RoutedExperts":
        """The sequence from its start; what a later piece repeats, as after a replay, counts once."""
        _, num_layers, top_k = pieces[0].shape
        row = len(pieces[0].data) // pieces[0].shape[0]
        data = bytearray()
        for piece in pieces:
            data[piece.first * row :] = piece.data
        return cls((len(data) // row, num_layers, top_k), pieces[0].dtype, bytes(data))


@dataclass(frozen=True, slots=True)
class Timing:
    """What a sequence has taken since its last output, or since its first step. Durations alone: hosts' clocks differ.

    Steps, and so what their experts cost (Step in actors/dispatch/step.py), are shared with all of the batch.
    Only the first output of a front has `queue_seconds`, from the request's arrival to its first step.
    """

    seconds: float
    num_steps: int
    expert_wait_seconds: float
    expert_compute_seconds: float
    num_failovers: int
    num_local_tokens: int
    queue_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What a step added to one sequence. Prompt log-probabilities come with the first output of a request; on their way
    those of a long prompt come in parts, which hold nothing else, before it. `embedding` is float32. An `error` is the
    request's own fault if `is_refusal`: its grammar has gone beyond the limits.

    `routed_experts` are those of the tokens computed since the last output: the ingress may end a sequence at any.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0
    routed_experts: RoutedExperts | None = None
    error: str | None = None
    is_refusal: bool = False
    timing: Timing | None = None
    is_part: bool = False
    embedding: bytes | None = None

    @property
    def num_logprobs(self) -> int:
        """Of tokens and their alternatives; all tokens have as many."""
        kinds = (self.prompt_logprobs or (), self.logprobs)
        return sum(len(scores) * (1 + len(scores[-1].top if scores[-1] else ())) for scores in kinds if scores)


@dataclass(frozen=True, slots=True)
class Delivery:
    """Outputs for one ingress, in order. The first has the number `first`; numbers count up from 1 within a lease."""

    first: int
    outputs: tuple[RequestOutput, ...] = ()


@dataclass(frozen=True, slots=True)
class Submitted:
    """A front's answer to a request: accepted, or why not ("full": ask again later; "dropped": the lease has ended)."""

    accepted: bool
    reason: Literal["", "full", "draining", "dropped"] = ""
    num_waiting: int = 0
