"""Logit bias, penalties and banned tokens of one sequence, as tensors that are kept from step to step.

A step costs what the vocabulary and the new tokens cost, however long the sequence and the lists of its request are:
one request must not hold up those that are computed beside it. Shapes: V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cluster.messages.requests import SamplingParams


class Adjustments:
    def __init__(self, params: SamplingParams, vocab_size: int, device: torch.device, num_uncounted: int = 0) -> None:
        """The first `num_uncounted` tokens are placeholders."""
        self.params = params
        ids, biases = zip(*params.logit_bias, strict=True) if params.logit_bias else ((), ())
        self._bias_ids = torch.tensor(ids, dtype=torch.int64, device=device)
        self._biases = torch.tensor(biases, dtype=torch.float32, device=device)
        self._stop_ids = torch.tensor(params.stop_token_ids, dtype=torch.int64, device=device)
        self._is_seen_V = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self._emitted_V = torch.zeros(vocab_size, dtype=torch.float32, device=device)
        self._num_counted = num_uncounted

    def apply(self, logits_V: Tensor, token_ids: Sequence[int], num_prompt: int) -> Tensor:
        """The adjusted logits of the token behind `token_ids`; leaves its input alone."""
        logits_V = logits_V.index_add(0, self._bias_ids, self._biases)
        self._penalise(logits_V, token_ids, num_prompt)
        if len(token_ids) - num_prompt < self.params.min_tokens:
            logits_V[self._stop_ids] = -torch.inf
        return logits_V

    def _penalise(self, logits_V: Tensor, token_ids: Sequence[int], num_prompt: int) -> None:
        """Repetition counts prompt and output, as in CTRL (arXiv 1909.05858); the others the output only, as OpenAI."""
        repetition, frequency = self.params.repetition_penalty, self.params.frequency_penalty
        presence = self.params.presence_penalty
        if repetition == 1.0 and not frequency and not presence:
            return
        self._count(token_ids, num_prompt)
        if repetition != 1.0:
            penalised_V = torch.where(logits_V > 0, logits_V / repetition, logits_V * repetition)
            torch.where(self._is_seen_V, penalised_V, logits_V, out=logits_V)
        logits_V -= frequency * self._emitted_V + presence * (self._emitted_V > 0)

    def _count(self, token_ids: Sequence[int], num_prompt: int) -> None:
        new = torch.tensor(token_ids[self._num_counted :], dtype=torch.int64, device=self._is_seen_V.device)
        emitted = new[max(0, num_prompt - self._num_counted) :]
        self._is_seen_V[new] = True
        self._emitted_V.index_add_(0, emitted, torch.ones_like(emitted, dtype=torch.float32))
        self._num_counted = len(token_ids)
