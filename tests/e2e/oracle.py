"""What a request must answer, computed the slow way: transformers, one sequence, the whole prefix for every token."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
import torch

from tests.checkpoints import generate, load_reference

# (logits, tokens so far with the prompt, output so far) -> logits
Rule = Callable[[torch.Tensor, list[int], list[int]], torch.Tensor]


class Oracle:
    def __init__(self, model_dir: Path) -> None:
        self.model_dir = model_dir
        self.tokenizer = tokenizers.Tokenizer.from_file(str(model_dir / "tokenizer.json"))

    @cached_property
    def model(self) -> Any:
        return load_reference(self.model_dir)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids  # type: ignore[no-any-return]

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids))  # type: ignore[no-any-return]

    def greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        return generate(self.model, prompt, num_tokens)

    def greedy_with(self, prompt: list[int], num_tokens: int, rule: Rule) -> list[int]:
        """Greedy continuation with `rule` applied to the logits of each step."""
        ids = list(prompt)
        for _ in range(num_tokens):
            logits_V = rule(self._logits(ids)[-1].clone(), ids, ids[len(prompt) :])
            ids.append(int(logits_V.argmax()))
        return ids[len(prompt) :]

    def logprobs(self, ids: Sequence[int]) -> torch.Tensor:
        """[T, V]; row t is the distribution of the token behind ids[: t + 1]."""
        return self._logits(ids).log_softmax(dim=-1)

    def scores(self, ids: Sequence[int]) -> list[float]:
        """Log-probability of every token but the first."""
        targets = torch.tensor(ids[1:])[:, None]
        return self.logprobs(ids)[:-1].gather(1, targets)[:, 0].tolist()  # type: ignore[no-any-return]

    @torch.inference_mode()
    def routed_experts(self, ids: Sequence[int]) -> torch.Tensor:
        """[T, layers, top-k]: the experts of each token, ascending."""
        found = self.model(torch.tensor([ids]), output_router_logits=True).router_logits
        top_k = self.model.config.num_experts_per_tok
        return torch.stack([layer.topk(top_k).indices.sort().values for layer in found], dim=1)

    @torch.inference_mode()
    def _logits(self, ids: Sequence[int]) -> torch.Tensor:
        return self.model(torch.tensor([ids])).logits[0].float()  # type: ignore[no-any-return]


def repeat(penalty: float) -> Rule:
    """Repetition penalty, as in CTRL (arXiv 1909.05858): on tokens of prompt and output."""

    def rule(logits_V: torch.Tensor, ids: list[int], output: list[int]) -> torch.Tensor:
        for token in set(ids):
            logits_V[token] *= 1 / penalty if logits_V[token] > 0 else penalty
        return logits_V

    return rule


def count(frequency: float, presence: float) -> Rule:
    """Frequency and presence penalty, as OpenAI documents them: on tokens of the output."""

    def rule(logits_V: torch.Tensor, ids: list[int], output: list[int]) -> torch.Tensor:
        for token, number in Counter(output).items():
            logits_V[token] -= frequency * number + presence
        return logits_V

    return rule


def bias(biases: dict[int, float]) -> Rule:
    """Logit bias."""

    def rule(logits_V: torch.Tensor, ids: list[int], output: list[int]) -> torch.Tensor:
        for token, value in biases.items():
            logits_V[token] += value
        return logits_V

    return rule
