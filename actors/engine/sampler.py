"""From logits to tokens, with every sampling rule of SamplingParams.

Randomness is a function of (request seed, position), so a sequence that is computed again continues identically.
Rules apply in the order of vLLM: banned tokens, logit bias, penalties, temperature, top-k, min-p, top-p.
Shapes: R rows, V vocabulary. Logits are float32.
"""

import hashlib

import torch
from torch import Tensor

from actors.engine.adjustments import Adjustments
from actors.engine.sequence import Sequence
from cluster.messages.requests import SamplingParams, TokenLogprob

GREEDY_BELOW = 1e-5
# Most nuclei fit into this many tokens; a whole-vocabulary sort is ten times slower.
NUCLEUS_GUESS = 1024


def sample(logits_RV: Tensor, sequences: list[Sequence]) -> list[int]:
    """The next token of each sequence; row r of the logits belongs to sequences[r]. Leaves the logits alone."""
    if all(_is_plain_greedy(s.request.params) for s in sequences):
        return [int(t) for t in logits_RV.argmax(dim=-1).tolist()]
    return [sample_one(row, sequence) for row, sequence in zip(logits_RV, sequences, strict=True)]


def sample_one(logits_V: Tensor, sequence: Sequence) -> int:
    params = sequence.request.params
    logits_V = adjust(logits_V, sequence)
    if params.temperature < GREEDY_BELOW:
        return int(logits_V.argmax())
    return draw(logits_V, params, uniform(params.seed, len(sequence.token_ids)))


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on the two integers only."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)


def adjust(logits_V: Tensor, sequence: Sequence) -> Tensor:
    """Banned tokens, logit bias and penalties. Returns the input itself when no rule applies."""
    params = sequence.request.params
    if _is_unadjusted(params, sequence.num_output):
        return logits_V
    if sequence.adjustments is None:
        sequence.adjustments = Adjustments(params, logits_V.shape[-1], logits_V.device)
    return sequence.adjustments.apply(logits_V, sequence.token_ids, sequence.num_prompt)


def draw(logits_V: Tensor, params: SamplingParams, u: float) -> int:
    """Invert the cumulative distribution of the tokens that temperature, top-k, min-p and top-p leave at `u`."""
    probs_V = torch.softmax(logits_V.double() / params.temperature, dim=-1)
    values, ids = _candidates(probs_V, params)
    if params.min_p:
        values = values.where(values >= params.min_p * probs_V.max(), 0)
    cumulated = values.cumsum(dim=-1)
    if params.top_p < 1:
        # Keep the smallest set whose mass reaches top_p of what is left; the most likely token always stays.
        values = values.where(cumulated - values < params.top_p * cumulated[-1], 0)
        cumulated = values.cumsum(dim=-1)
    choice = int(torch.searchsorted(cumulated, u * cumulated[-1], right=True))
    choice = min(choice, int(torch.count_nonzero(cumulated < cumulated[-1])))  # u close to 1: last token that is left
    return choice if ids is None else int(ids[choice])


def _candidates(probs_V: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor | None]:
    """Tokens to choose from: the top-k, or enough for the nucleus, most likely first; or all in order (ids None)."""
    size = probs_V.shape[-1]
    if 0 < params.top_k < size:
        return tuple(probs_V.topk(params.top_k))  # type: ignore[return-value]
    if params.top_p >= 1:
        return probs_V, None
    values, ids = probs_V.topk(min(size, NUCLEUS_GUESS))
    # Renormalising after min-p only shrinks the nucleus, so this mass is enough in any case.
    if float(values.sum()) < params.top_p:
        values, ids = probs_V.sort(descending=True, stable=True)
    return values, ids


def token_logprob(logprobs_V: Tensor, token_id: int, num_top: int) -> TokenLogprob:
    """Report one token of a log-softmaxed row, with the `num_top` most likely tokens."""
    logprob = logprobs_V[token_id]
    rank = int((logprobs_V > logprob).sum()) + 1
    top: tuple[tuple[int, float], ...] = ()
    if num_top:
        values, ids = logprobs_V.topk(num_top)
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token_id, float(logprob), rank, top)


def _is_plain_greedy(params: SamplingParams) -> bool:
    return params.temperature < GREEDY_BELOW and _is_unadjusted(params, 0)


def _is_unadjusted(params: SamplingParams, num_output: int) -> bool:
    return (
        not params.logit_bias
        and params.repetition_penalty == 1.0
        and not params.frequency_penalty
        and not params.presence_penalty
        and num_output >= params.min_tokens
    )
