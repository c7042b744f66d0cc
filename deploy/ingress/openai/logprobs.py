"""Log-probabilities and routed experts in the shapes that OpenAI and vLLM gave them. For dump()."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from cluster.messages.requests import RoutedExperts, TokenLogprob
from deploy.ingress.openai.answer_json import Base64, Rows
from deploy.ingress.openai.choices import TokenRow
from deploy.ingress.text.tokens import Tokenizer

# JSON has no -Infinity; vLLM sends the same number.
LOWEST = -9999.0

Json = dict[str, Any]


def finite(logprob: float) -> float:
    return logprob if logprob > LOWEST else LOWEST


def completion_logprobs(rows: Sequence[TokenRow], num_top: int, tokenizer: Tokenizer) -> Json:
    """The shape of /v1/completions: four parallel lists. A prompt's first token has no log-probability: null."""
    return {
        "tokens": Rows(rows, lambda row: tokenizer.token_text(row.token_id)),
        "token_logprobs": Rows(rows, lambda row: row.logprob and finite(row.logprob.logprob)),
        "top_logprobs": Rows(rows, lambda row: row.logprob and _top_by_text(row.logprob, num_top, tokenizer)),
        "text_offset": Rows(rows, lambda row: row.text_offset),
    }


def chat_logprobs(rows: Sequence[TokenRow], num_top: int, tokenizer: Tokenizer) -> Json:
    """The shape of /v1/chat/completions: one entry per token."""
    scored = [(row.token_id, row.logprob) for row in rows if row.logprob is not None]

    def shape(row: tuple[int, TokenLogprob]) -> Json:
        token_id, logprob = row
        top = [_chat_entry(*alternative, tokenizer) for alternative in logprob.top[:num_top]]
        return _chat_entry(token_id, logprob.logprob, tokenizer) | {"top_logprobs": top}

    return {"content": Rows(scored, shape), "refusal": None}


def prompt_logprobs(found: Sequence[TokenLogprob | None], num_top: int, tokenizer: Tokenizer) -> Rows[Any]:
    """vLLM's shape: per prompt token {token id: {logprob, rank, decoded_token}}, null for the first token."""
    return Rows(found, lambda entry: entry and _by_id(entry, num_top, tokenizer))


def routed_experts(routed: RoutedExperts) -> Base64:
    """vLLM's shape: base64 of a .npy file; np.load(io.BytesIO(base64.b64decode(s))) reads it."""
    array = np.frombuffer(routed.data, dtype=routed.dtype).reshape(routed.shape)
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return Base64(file.getvalue())


def _top_by_text(entry: TokenLogprob, num_top: int, tokenizer: Tokenizer) -> dict[str, float]:
    """The token itself is always there, so there may be num_top + 1 (as OpenAI). Best first."""
    found: dict[str, float] = {}
    for token_id, logprob in (*entry.top[:num_top], (entry.token_id, entry.logprob)):
        found.setdefault(tokenizer.token_text(token_id), finite(logprob))
    return found


def _by_id(entry: TokenLogprob, num_top: int, tokenizer: Tokenizer) -> dict[str, Json]:
    ranked = [(entry.token_id, entry.logprob, entry.rank)]
    ranked += [(token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(entry.top[:num_top], start=1)]
    return {
        str(token_id): {"logprob": finite(logprob), "rank": rank, "decoded_token": tokenizer.token_text(token_id)}
        for token_id, logprob, rank in ranked
    }


def _chat_entry(token_id: int, logprob: float, tokenizer: Tokenizer) -> Json:
    return {
        "token": tokenizer.token_text(token_id),
        "logprob": finite(logprob),
        "bytes": list(tokenizer.token_bytes(token_id)),
    }
