"""From logits to tokens, with every sampling rule of SamplingParams.

Randomness is a function of (request seed, position), so a sequence that is computed again continues identically.
Rules apply in this order: grammar, logit bias, penalties, banned tokens, temperature, top-k, min-p, top-p.
Shapes: R rows, V vocabulary, N tokens to choose from. Logits are float32.
"""

import hashlib
from collections.abc import Sequence as Numbers

import torch
from torch import Tensor

from actors.engine.adjustments import Adjustments
from actors.engine.constraint import masked
from actors.engine.sequence import Sequence
from actors.staging import DIRECT, Staging
from cluster.messages.requests import SamplingParams, TokenLogprob

GREEDY_BELOW = 1e-5
# Most nuclei fit into this many tokens; a whole-vocabulary sort is ten times slower.
NUCLEUS_GUESS = 1024
# In place of a token.
SHORT = -1
# What rules a row is drawn by, and a number in [0, 1).
Drawn = tuple[SamplingParams, float]


def sample(logits_RV: Tensor, sequences: list[Sequence], staging: Staging = DIRECT) -> list[int]:
    """The next token of each sequence; row r of the logits belongs to sequences[r]. Leaves the logits alone.

    A row's token does not depend on the other rows. One read-back from the device, however many rows there are.
    """
    adjusted_RV = _adjust_all(logits_RV, sequences, staging)
    drawn = {
        r: (s.request.params, uniform(s.request.params.seed, len(s.token_ids)))
        for r, s in enumerate(sequences)
        if s.request.params.temperature >= GREEDY_BELOW
    }
    return draw(adjusted_RV, drawn, staging)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on the two integers only."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)


def _adjust_all(logits_RV: Tensor, sequences: list[Sequence], staging: Staging) -> Tensor:
    masks = {r: s.constraint.mask_W for r, s in enumerate(sequences) if s.constraint}
    wanted = [r for r, s in enumerate(sequences) if not _is_unadjusted(s.request.params, s.num_output)]
    if not wanted and not masks:
        return logits_RV
    logits_RV = masked(logits_RV, masks, staging) if masks else logits_RV.clone()
    for r in wanted:
        logits_RV[r] = adjust(logits_RV[r], sequences[r])
    return logits_RV


def adjust(logits_V: Tensor, sequence: Sequence) -> Tensor:
    """Banned tokens, logit bias and penalties. Returns the input itself when no rule applies."""
    params = sequence.request.params
    if _is_unadjusted(params, sequence.num_output):
        return logits_V
    if sequence.adjustments is None:
        num_uncounted = 0 if sequence.is_shareable else sequence.num_prompt
        sequence.adjustments = Adjustments(params, logits_V.shape[-1], logits_V.device, num_uncounted)
    return sequence.adjustments.apply(logits_V, sequence.token_ids, sequence.num_prompt)


def draw(logits_RV: Tensor, drawn: dict[int, Drawn], staging: Staging = DIRECT) -> list[int]:
    """A token for each row: of those in `drawn`, where the cumulative distribution of the tokens that temperature,
    top-k, min-p and top-p leave reaches a number in [0, 1); the most likely one of the others.

    Most rows need their likeliest tokens only. Those whose nucleus turns out larger are drawn again, from all.
    """
    num_rows, size = logits_RV.shape
    if len(drawn) < num_rows:
        tokens_R = logits_RV.argmax(dim=-1)
    else:
        tokens_R = torch.empty(num_rows, dtype=torch.int64, device=logits_RV.device)
    widths = {r: _width(params, size) for r, (params, _) in drawn.items()}
    for group in _groups(widths, is_on_cpu=logits_RV.device.type == "cpu"):
        rows_R, found_R = _draw(logits_RV, drawn, group, widths[group[0]], staging)
        tokens_R[rows_R] = found_R
    tokens: list[int] = tokens_R.tolist()
    if short := [r for r, token in enumerate(tokens) if token == SHORT]:
        _, found_R = _draw(logits_RV, drawn, short, size, staging)
        for r, token in zip(short, found_R.tolist(), strict=True):
            tokens[r] = token
    return tokens


def _groups(widths: dict[int, int], *, is_on_cpu: bool) -> list[list[int]]:
    """Rows that are drawn together. A GPU likes large pieces; on a CPU one row stays in the caches."""
    if is_on_cpu:
        return [[r] for r in widths]
    return [[r for r, each in widths.items() if each == width] for width in dict.fromkeys(widths.values())]


def _width(params: SamplingParams, size: int) -> int:
    """How many of the likeliest tokens, in that order, the rules need; 0: all of them, in the vocabulary's order."""
    if 0 < params.top_k < size:
        return params.top_k
    return 0 if params.top_p >= 1 else min(size, NUCLEUS_GUESS)


def _draw(
    logits_RV: Tensor, drawn: dict[int, Drawn], rows: list[int], width: int, staging: Staging
) -> tuple[Tensor, Tensor]:
    """(these rows, their token ids), SHORT where the `width` likeliest tokens are less than the nucleus. Stays on the
    device. Rules that no row has are left out; for rows that don't have one, it changes nothing.
    """
    chosen = [drawn[r][0] for r in rows]
    rules = [(p.temperature, p.top_p, p.min_p, 0 < p.top_k <= width, u) for p, u in (drawn[r] for r in rows)]
    rows_R, rules_5R1 = staging.upload(torch.tensor(rows), torch.tensor(rules, dtype=torch.float64).T.contiguous())
    if len(rows) < len(logits_RV):
        logits_RV = logits_RV[rows[0] : rows[0] + 1] if len(rows) == 1 else logits_RV[rows_R]
    temperature_R1, top_p_R1, min_p_R1, has_top_k_R1, u_R1 = rules_5R1[:, :, None]
    probs_RV = torch.softmax(logits_RV.double() / temperature_R1, dim=-1)
    if any(p.min_p for p in chosen):
        probs_RV = probs_RV.where(probs_RV >= min_p_R1 * probs_RV.amax(-1, keepdim=True), 0)
    values_RN, ids_RN = _ranked(probs_RV, width)
    cumulated_RN = values_RN.cumsum(dim=-1)
    is_short_R1 = None
    if any(p.top_p < 1 for p in chosen):
        left_R1 = values_RN.sum(-1, keepdim=True)
        if 0 < width < logits_RV.shape[-1]:  # without top-k, what is left is more than the likeliest tokens
            left_R1 = torch.where(has_top_k_R1 > 0, left_R1, probs_RV.sum(-1, keepdim=True))
        is_short_R1 = cumulated_RN[:, -1:] < top_p_R1 * left_R1
        # The smallest set whose mass reaches top_p of what is left; the most likely token always stays.
        is_kept_RN = (top_p_R1 >= 1) | (cumulated_RN - values_RN < top_p_R1 * left_R1)
        cumulated_RN = values_RN.where(is_kept_RN, 0).cumsum(dim=-1)
    total_R1 = cumulated_RN[:, -1:].contiguous()
    choice_R1 = torch.searchsorted(cumulated_RN, u_R1 * total_R1, right=True)
    # u close to 1: the last token that is left
    choice_R1 = torch.minimum(choice_R1, torch.count_nonzero(cumulated_RN < total_R1, dim=-1)[:, None])
    tokens_R1 = choice_R1 if ids_RN is None else ids_RN.gather(1, choice_R1)
    if is_short_R1 is not None and 0 < width < logits_RV.shape[-1]:
        tokens_R1 = torch.where(is_short_R1, SHORT, tokens_R1)
    return rows_R, tokens_R1[:, 0]


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
    columns = [logprob_R1, (logprobs_RV > logprob_R1).sum(1, keepdim=True) + 1]
    # For each number on its own: which of equal ones are among the first may depend on how many are asked for.
    numbers = sorted(set(num_top) - {0})
    for number in numbers:
        columns += logprobs_RV.topk(number)
    # float64 holds all of them as they are.
    told = torch.cat([column.double() for column in columns], dim=1).tolist()
    begins = {number: 2 + 2 * sum(numbers[:i]) for i, number in enumerate(numbers)} | {0: 0}
    return [
        TokenLogprob(token, row[0], int(row[1]), _pairs(row[begins[n] : begins[n] + 2 * n]))
        for token, n, row in zip(token_ids, num_top, told, strict=True)
    ]


def _pairs(values_and_ids: list[float]) -> tuple[tuple[int, float], ...]:
    number = len(values_and_ids) // 2
    return tuple(
        (int(token), value) for value, token in zip(values_and_ids[:number], values_and_ids[number:], strict=True)
    )


def _is_unadjusted(params: SamplingParams, num_output: int) -> bool:
    return (
        not params.logit_bias
        and params.repetition_penalty == 1.0
        and not params.frequency_penalty
        and not params.presence_penalty
        and num_output >= params.min_tokens
    )
