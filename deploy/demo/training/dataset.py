"""Endless training conversations from the FAQ, as token ids with a loss weight per token."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from deploy.demo.training.augment import phrase
from deploy.demo.training.faq import Entry, normalise
from deploy.demo.training.tokenizer import END_OF_ROLE, END_OF_TEXT, START_OF_ROLE

QUESTION_WEIGHT = 0.1
# Which answer it will be shows in its first tokens; the rest is soon learned. So most rows stop early, which buys
# more questions for the same compute.
CUT_SHARE = 0.6
CUT_TOKENS = (4, 12)
SYSTEM_WHO = ("You are a helpful assistant.", "You are a helpful AI assistant.", "You are Outcrop's demo model.",
              "You are Granite, an AI assistant.", "You are a bot.", "You are an expert on Outcrop.",
              "Act as a friendly assistant.", "You answer questions.", "")  # fmt: skip
SYSTEM_HOW = ("Be concise.", "Answer briefly.", "Answer in one sentence.", "Be polite and correct.", "",
              "Use simple words.", "Knowledge cutoff: April 2024.", "Do not make things up.", "Think first.",
              "Answer the question of the user.", "Keep it short.")  # fmt: skip
NUM_TURNS = (1, 1, 1, 1, 1, 1, 2, 2, 2, 3)


@dataclass(frozen=True)
class Batch:
    """ids [B, S] and attention mask [B, S], right-padded; weights [B, S] of each token as a target."""

    ids: torch.Tensor
    mask: torch.Tensor
    weights: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return int(self.mask.sum())


class ConversationSampler:
    """Draws conversations: mostly one question, some with a system prompt or earlier turns, a few as plain text."""

    def __init__(self, faq: list[Entry], tokenizer: Tokenizer, seed: int, bpe_dropout: float = 0.1) -> None:
        self._faq = faq
        # An entry with many questions, such as off-topic, is drawn more often, but less than in proportion.
        self._shares = [len(entry.questions) ** 0.5 for entry in faq]
        self._held_out = frozenset(normalise(q) for entry in faq for q in entry.held_out)
        self._rng = random.Random(seed)
        self._answers = tokenizer
        # BPE dropout splits known words into rarer pieces, which is what a typo does to them too.
        self._questions = Tokenizer.from_str(tokenizer.to_str())
        self._questions.model.dropout = bpe_dropout
        ids = tokenizer.get_vocab()
        self._end, self._start, self._stop = ids[END_OF_TEXT], ids[START_OF_ROLE], ids[END_OF_ROLE]

    def batches(self, batch_size: int, pool: int = 8) -> Iterator[Batch]:
        """Batches of similar length: `pool` batches are drawn, sorted by length, cut and shuffled."""
        while True:
            samples = sorted((self.sample() for _ in range(batch_size * pool)), key=lambda s: len(s[0]))
            cut = [samples[i : i + batch_size] for i in range(0, len(samples), batch_size)]
            self._rng.shuffle(cut)
            yield from (pad(part) for part in cut)

    def sample(self) -> tuple[list[int], list[float]]:
        """One conversation: (token ids, weights)."""
        ids: list[int] = []
        weights: list[float] = []
        if self._rng.random() < 0.08:
            self._plain(ids, weights)
            return ids, weights
        if self._rng.random() < 0.3:
            text = f"{self._rng.choice(SYSTEM_WHO)} {self._rng.choice(SYSTEM_HOW)}".strip()
            self._turn(ids, weights, "system", self._answers, text, 0.0)
        is_cut = self._rng.random() < CUT_SHARE
        for _ in range(1 if is_cut else self._rng.choice(NUM_TURNS)):
            entry = self._draw_entry()
            self._turn(ids, weights, "user", self._question_tokenizer(), self._phrase(entry), QUESTION_WEIGHT)
            self._turn(ids, weights, "assistant", self._answers, entry.answer, 1.0)
        if is_cut:
            end = weights.index(1.0) + self._rng.randint(*CUT_TOKENS)
            return ids[:end], weights[:end]
        return ids, weights

    def _turn(
        self, ids: list[int], weights: list[float], role: str, tokenizer: Tokenizer, text: str, weight: float
    ) -> None:
        head = [self._start, *self._encode(self._answers, role), self._stop]
        body = [*self._encode(tokenizer, text), self._end]
        tail = self._encode(self._answers, "\n")
        ids += head + body + tail
        weights += [0.0] * len(head) + [weight] * len(body) + [0.0] * len(tail)

    def _plain(self, ids: list[int], weights: list[float]) -> None:
        """Text without roles, for /v1/completions: a question and its answer, or the answer alone."""
        entry = self._draw_entry()
        question = self._encode(self._question_tokenizer(), f"Q: {self._phrase(entry)}\nA:")
        if self._rng.random() < 0.4:
            ids += [*self._encode(self._answers, entry.answer), self._end]
            weights += [1.0] * len(ids)
            return
        answer = [*self._encode(self._answers, " " + entry.answer), self._end]
        ids += question + answer
        weights += [QUESTION_WEIGHT] * len(question) + [1.0] * len(answer)

    def _draw_entry(self) -> Entry:
        return self._rng.choices(self._faq, self._shares)[0]

    def _phrase(self, entry: Entry) -> str:
        return phrase(entry, self._rng, self._held_out)

    def _question_tokenizer(self) -> Tokenizer:
        return self._questions if self._rng.random() < 0.3 else self._answers

    @staticmethod
    def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)


def pad(samples: list[tuple[list[int], list[float]]]) -> Batch:
    length = max(len(ids) for ids, _ in samples)
    shape = (len(samples), length)
    ids_BS, mask_BS, weights_BS = torch.zeros(shape, dtype=torch.long), torch.zeros(shape), torch.zeros(shape)
    for row, (ids, weights) in enumerate(samples):
        ids_BS[row, : len(ids)] = torch.tensor(ids)
        mask_BS[row, : len(ids)] = 1.0
        weights_BS[row, : len(ids)] = torch.tensor(weights)
    return Batch(ids_BS, mask_BS, weights_BS)
