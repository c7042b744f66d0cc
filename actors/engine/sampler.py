"""From logits to tokens, with every sampling rule of SamplingParams.

Randomness is a function of (request seed, position), so a sequence that is computed again continues identically.
Rules apply in this order: logit bias, penalties, banned tokens, temperature, top-k, min-p, top-p.
Shapes: R rows, V vocabulary, N tokens to choose from. Logits are float32.
"""

import hashlib
from collections.abc import Sequence as Numbers

import torch
from torch import Tensor

from actors.engine.adjustments import Adjustments
from actors.engine.sequence import Sequence
from cluster.messages.requests import SamplingParams, TokenLogprob

GREEDY_BELOW = 1e-5
# Most nuclei fit into this many tokens; a whole-vocabulary sort is ten times slower.
NUCLEUS_GUESS = 1024
# In place of a token.
SHORT = -1


def sample(logits_RV: Tensor, sequences: list[Sequence]) -> list[int]:
    """The next token of each sequence; row r of the logits belongs to sequences[r]. Leaves the logits alone.

    A row's token does not depend on the other rows. One read-back from the device, however many rows there are.
    """
    adjusted_RV = _adjust_all(logits_RV, sequences)
    drawn = [r for r, sequence in enumerate(sequences) if sequence.request.params.temperature >= GREEDY_BELOW]
    if not drawn:
        return [int(token) for token in adjusted_RV.argmax(dim=-1).tolist()]
    params = [sequences[r].request.params for r in drawn]
    uniforms = [uniform(p.seed, len(sequences[r].token_ids)) for p, r in zip(params, drawn, strict=True)]
    if len(drawn) == len(sequences):
        return draw(adjusted_RV, params, uniforms)
    tokens = [int(token) for token in adjusted_RV.argmax(dim=-1).tolist()]
    for r, token in zip(drawn, draw(adjusted_RV[drawn], params, uniforms), strict=True):
        tokens[r] = token
    return tokens


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on the two integers only."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)


def _adjust_all(logits_RV: Tensor, sequences: list[Sequence]) -> Tensor:
    wanted = [r for r, s in enumerate(sequences) if not _is_unadjusted(s.request.params, s.num_output)]
    if not wanted:
        return logits_RV
    logits_RV = logits_RV.clone()
    for r in wanted:
        logits_RV[r] = adjust(logits_RV[r], sequences[r])
    return logits_RV


def adjust(logits_V: Tensor, sequence: Sequence) -> Tensor:
    """Banned tokens, logit bias and penalties. Returns the input itself when no rule applies."""
    params = sequence.request.params
    if _is_unadjusted(params, sequence.num_output):
        return logits_V
    if sequence.adjustments is None:
        sequence.adjustments = Adjustments(params, logits_V.shape[-1], logits_V.device)
    return sequence.adjustments.apply(logits_V, sequence.token_ids, sequence.num_prompt)


def draw(logits_RV: Tensor, params: list[SamplingParams], uniforms: list[float]) -> list[int]:
    """Row by row, invert the cumulative distribution of the tokens that temperature, top-k, min-p and top-p leave.

    Most rows need their likeliest tokens only. Those whose nucleus turns out larger are drawn again, from all.
    """
    size = logits_RV.shape[-1]
    widths = [_width(p, size) for p in params]
    groups = [[r for r, each in enumerate(widths) if each == width] for width in dict.fromkeys(widths)]
    found = torch.cat(
        [
            _draw(logits_RV[rows], [params[r] for r in rows], [uniforms[r] for r in rows], widths[rows[0]])
            for rows in groups
        ]
    ).tolist()
    tokens = dict(zip((r for rows in groups for r in rows), found, strict=True))
    if short := [r for r, token in tokens.items() if token == SHORT]:
        again = _draw(logits_RV[short], [params[r] for r in short], [uniforms[r] for r in short], size)
        tokens |= dict(zip(short, again.tolist(), strict=True))
    return [int(tokens[r]) for r in range(len(params))]


def _width(params: SamplingParams, size: int) -> int:
    """How many of the likeliest tokens, in that order, the rules need; 0: all of them, in the vocabulary's order."""
    if 0 < params.top_k < size:
        return min(size, NUCLEUS_GUESS) if params.top_k <= NUCLEUS_GUESS else size
    return 0 if params.top_p >= 1 else min(size, NUCLEUS_GUESS)


def _draw(logits_RV: Tensor, params: list[SamplingParams], uniforms: list[float], width: int) -> Tensor:
    """Token ids [R], SHORT where the `width` likeliest tokens are less than the nucleus. Stays on the device."""
    size = logits_RV.shape[-1]
    rules = [(p.temperature, p.top_p, p.min_p, p.top_k or size, u) for p, u in zip(params, uniforms, strict=True)]
    rules_5R1 = torch.tensor(rules, dtype=torch.float64).to(logits_RV.device, non_blocking=True).T[:, :, None]
    temperature_R1, top_p_R1, min_p_R1, top_k_R1, u_R1 = rules_5R1.contiguous()
    values_RN, ids_RN = _ranked(torch.softmax(logits_RV.double() / temperature_R1, dim=-1), width)
    # Renormalising after min-p only shrinks the nucleus, so this mass is enough in any case.
    is_short_R1 = (values_RN.sum(-1, keepdim=True) < top_p_R1) & (top_k_R1 >= size) & (0 < width < size)
    if ids_RN is not None:
        values_RN = values_RN.where(torch.arange(width, device=values_RN.device) < top_k_R1, 0)
    values_RN = values_RN.where(values_RN >= min_p_R1 * values_RN.amax(-1, keepdim=True), 0)
    # The smallest set whose mass reaches top_p of what is left; the most likely token always stays.
    cumulated_RN = values_RN.cumsum(dim=-1)
    is_kept_RN = (top_p_R1 >= 1) | (cumulated_RN - values_RN < top_p_R1 * cumulated_RN[:, -1:])
    cumulated_RN = values_RN.where(is_kept_RN, 0).cumsum(dim=-1)
    total_R1 = cumulated_RN[:, -1:].contiguous()
    choice_R1 = torch.searchsorted(cumulated_RN, u_R1 * total_R1, right=True)
    # u close to 1: the last token that is left
    choice_R1 = torch.minimum(choice_R1, torch.count_nonzero(cumulated_RN < total_R1, dim=-1)[:, None])
    tokens_R1 = choice_R1 if ids_RN is None else ids_RN.gather(1, choice_R1)
    return torch.where(is_short_R1, SHORT, tokens_R1)[:, 0]


def _ranked(probs_RV: Tensor, width: int) -> tuple[Tensor, Tensor | None]:
    """The likeliest tokens first, and their ids; or all in order (ids None)."""
    if width == 0:
        return probs_RV, None
    if width == probs_RV.shape[-1]:
        return probs_RV.sort(dim=-1, descending=True, stable=True)
    return tuple(probs_RV.topk(width))  # type: ignore[return-value]


def token_logprobs(logprobs_RV: Tensor, token_ids: Numbers[int], num_top: Numbers[int]) -> list[TokenLogprob]:
    """Report one token of each log-softmaxed row, with the row's `num_top` most likely tokens. One read-back."""
    ids_R1 = torch.tensor(token_ids, device=logprobs_RV.device)[:, None]
    logprob_R1 = logprobs_RV.gather(1, ids_R1)
    rank_R1 = (logprobs_RV > logprob_R1).sum(1, keepdim=True) + 1
    values_RN, top_RN = logprobs_RV.topk(max(num_top))
    # float64 holds all of them as they are.
    columns = torch.cat([t.double() for t in (logprob_R1, rank_R1, values_RN, top_RN)], dim=1).tolist()
    most = values_RN.shape[1]
    return [
        TokenLogprob(
            token,
            logprob,
            int(rank),
            tuple((int(i), value) for i, value in zip(rest[most : most + n], rest[:n], strict=True)),
        )
        for token, n, (logprob, rank, *rest) in zip(token_ids, num_top, columns, strict=True)
    ]


def _is_unadjusted(params: SamplingParams, num_output: int) -> bool:
    return (
        not params.logit_bias
        and params.repetition_penalty == 1.0
        and not params.frequency_penalty
        and not params.presence_penalty
        and num_output >= params.min_tokens
    )
