"""Grammars that answers keep to: llguidance, with a model's own tokenizer, within bounds.

A grammar is what a client has sent, so it may be anything: what it costs to compile, and to apply to one token, is
bounded here; the time that it takes, where it comes from (deploy/ingress/sandbox.py). Ingress and fronts compile with
the same bounds, so that no front meets a grammar that was not checked. Knows no torch.
"""

import json
import re
from collections import OrderedDict
from pathlib import Path

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from cluster.errors import ModelError
from cluster.models.family import read_spec
from cluster.models.files import read_file

MAX_TOKENIZER_BYTES = 256 * 2**20
MAX_ERROR_CHARS = 300
# It travels to a front with each choice.
MAX_CHARS = 400_000
# What is kept compiled. A large grammar takes 300 times the memory of its text.
MAX_KEPT = 64
MAX_KEPT_CHARS = MAX_CHARS
TOKEN = re.compile(r"<[^<>\s]+>")
# Fuel is spent at 50,000 (initial) and 14,000 (step) per millisecond; a state takes up to 2 kB. A mask of a usual
# grammar takes some microseconds, the most expensive one 4 ms: other sequences of its step wait for it.
LIMITS = LLParserLimits(
    max_items_in_row=10_000,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=50_000,
    step_max_items=50_000,
    max_lexer_states=50_000,
    max_grammar_size=60_000,
    verbose_errors=False,
)


class GrammarError(ValueError):
    """A grammar can't be compiled, or goes beyond the limits; the text says why."""


class Grammars:
    """Compiles grammars for one model. `added`: tokens that a tokenizer finds before all others, and that a grammar can
    name: <...>. Raises ModelError if its tokenizer can't be loaded."""

    def __init__(self, model_dir: Path) -> None:
        spec = read_spec(model_dir)
        path = model_dir / "tokenizer.json"
        try:
            source = read_file(path, MAX_TOKENIZER_BYTES)
            added = (each["content"] for each in json.loads(source).get("added_tokens") or ())
            self.added = frozenset(each for each in added if TOKEN.fullmatch(each))
            self._tokenizer = LLTokenizer(source, n_vocab=spec.vocab_size, eos_token=list(spec.eos_token_ids) or None)
        except Exception as error:  # llguidance raises bare exceptions
            raise ModelError(f"{path} can't be used for structured output: {error}") from None
        self._kept: OrderedDict[str, LLMatcher] = OrderedDict()  # the one that was used last stands last

    def compile(self, grammar: str) -> LLMatcher:
        """A matcher that has seen no token. `grammar` is llguidance's own form: Lark, or JSON. Lets go of the
        interpreter's lock. One call at a time. Raises GrammarError.

        Compiled once, as long as it is among those that are kept: a copy takes microseconds.
        """
        if len(grammar) > MAX_CHARS:
            raise GrammarError("it is too large")
        matcher = self._kept.pop(grammar, None) or self._compiled(grammar)
        self._kept[grammar] = matcher
        while len(self._kept) > MAX_KEPT or sum(map(len, self._kept)) > MAX_KEPT_CHARS:
            self._kept.popitem(last=False)
        return matcher.deep_copy()

    def _compiled(self, grammar: str) -> LLMatcher:
        matcher = LLMatcher(self._tokenizer, grammar, limits=LIMITS, log_level=0)
        check(matcher)
        return matcher

    def try_out(self, grammar: str) -> None:
        """Compile, and find the first token: what can't be begun is refused too. Raises GrammarError."""
        matcher = self.compile(grammar)
        mask = matcher.compute_bitmask()
        check(matcher)
        if not any(mask):
            raise GrammarError("no text satisfies it")


def check(matcher: LLMatcher) -> None:
    """Raises GrammarError if the matcher has failed."""
    if matcher.is_error():
        raise GrammarError(_why(matcher.get_error()))


def _why(told: str) -> str:
    """llguidance's error without its excerpt of the grammar, which may be ours."""
    if told.startswith("panic"):
        return "it is too large"
    if told.startswith("NoExtension"):
        return "no text satisfies it"
    told = re.split(r"\n *\d+ \| |\n<", told)[0].removeprefix("Parser Error: ")
    return " ".join(told.split())[:MAX_ERROR_CHARS] or "it is not valid"
