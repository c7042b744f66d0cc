"""What a step tells: log-probabilities of prompts, and the next token of each sequence that is to get one.

Shapes: R rows that need logits, D hidden, V vocabulary.
"""

import torch
from torch import Tensor

from actors.engine.sampler import sample, token_logprobs
from actors.engine.sequence import Sequence
from actors.model.front_half import FrontHalf
from actors.staging import Staging
from cluster.messages.requests import TokenLogprob

# Rows whose logits exist at once: 64 rows of a 49k vocabulary in float32 are 12 MiB.
LOGIT_ROWS = 64
# A token, and its log-probability where the request wants it.
Sampled = tuple[int, TokenLogprob | None]


def score_prompt(model: FrontHalf, sequence: Sequence, rows_RD: Tensor, position: int) -> None:
    """Add to the sequence's prompt scores: `rows_RD[i]` is the hidden state at `position + i`, which tells the token
    after it.
    """
    scores = sequence.prompt_logprobs
    assert scores is not None
    targets = sequence.request.prompt_token_ids[position + 1 : position + 1 + len(rows_RD)]
    num_top = sequence.request.params.prompt_logprobs or 0
    for start in range(0, len(targets), LOGIT_ROWS):
        some = targets[start : start + LOGIT_ROWS]
        logprobs_RV = model.logits(rows_RD[start : start + len(some)]).log_softmax(dim=-1)
        scores.extend(token_logprobs(logprobs_RV, some, [num_top] * len(some)))


def sample_next(model: FrontHalf, sequences: list[Sequence], hidden_RD: Tensor) -> dict[str, Sampled]:
    """The next token of each sequence, by request id; row r is the last hidden state of sequences[r]."""
    sampled: dict[str, Sampled] = {}
    for start in range(0, len(sequences), LOGIT_ROWS):
        some = sequences[start : start + LOGIT_ROWS]
        logits_RV = model.logits(hidden_RD[start : start + len(some)])
        tokens = sample(logits_RV, some, model.staging)
        scores = _scores(logits_RV, some, tokens, model.staging)
        sampled |= {
            s.request.request_id: (token, scores.get(r)) for r, (s, token) in enumerate(zip(some, tokens, strict=True))
        }
    return sampled


def _scores(
    logits_RV: Tensor, sequences: list[Sequence], tokens: list[int], staging: Staging
) -> dict[int, TokenLogprob]:
    """By row, of those that want them."""
    wanted = {r: n for r, s in enumerate(sequences) if (n := s.request.params.logprobs) is not None}
    if not wanted:
        return {}
    rows = list(wanted)
    (rows_R,) = staging.upload(torch.tensor(rows))
    logprobs_RV = logits_RV[rows_R].log_softmax(dim=-1)
    scored = token_logprobs(logprobs_RV, [tokens[r] for r in rows], list(wanted.values()))
    return dict(zip(rows, scored, strict=True))
