"""One choice of an answer: what the engine reports goes in, what the client may see comes out.

Joins the detokeniser, the stop strings and the bookkeeping of log-probabilities. Knows no JSON and no transport.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from cluster.messages.requests import FinishReason, RequestOutput, RoutedExperts, SamplingParams, TokenLogprob
from deploy.ingress.openai.requests import ChatCompletionRequest, CompletionRequest
from deploy.ingress.text.reasoning import MARKS, ReasoningSplitter
from deploy.ingress.text.stop_strings import StopChecker
from deploy.ingress.text.tokens import IncrementalDetokenizer, Tokenizer
from deploy.ingress.text.tool_calls import ToolCallDelta, ToolCallParser, join_calls

# A token with its log-probability takes as long to write as so many characters of text, and more.
LOGPROB_CHARS = 10


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A token with its log-probability (None for the first of a prompt) and where its text begins in the choice."""

    token_id: int
    logprob: TokenLogprob | None
    text_offset: int


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """What is new in a choice. The first one has the prompt; `token_ids` and `rows` (echoed prompt first) are there
    only if the request asks for them.

    `stop_reason` is the stop string or the stop token id of the request that ended it, None for end-of-sequence.
    """

    index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    rows: tuple[TokenRow, ...] = ()
    is_first: bool = False
    prompt_token_ids: tuple[int, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    routed_experts: RoutedExperts | None = None
    tool_calls: tuple[ToolCallDelta, ...] = ()
    has_called: bool = False  # a tool, in this delta or before it
    reasoning: str = ""  # what a thinking model says before its answer

    @property
    def size(self) -> int:
        """How much there is to write, in characters."""
        rows = len(self.rows) * _num_logprobs(self.rows[-1].logprob) if self.rows else 0
        scores = len(self.prompt_logprobs) * _num_logprobs(self.prompt_logprobs[-1]) if self.prompt_logprobs else 0
        routed = len(self.routed_experts.data) if self.routed_experts else 0
        arguments = sum(len(call.arguments) for call in self.tool_calls)
        written = len(self.text) + len(self.reasoning) + arguments + len(self.prompt_token_ids)
        return written + LOGPROB_CHARS * (rows + scores) + routed

    @property
    def is_empty(self) -> bool:
        """Nothing to tell a client, such as text that may still become a stop string."""
        shown = self.text or self.reasoning or self.tool_calls
        return not (shown or self.token_ids or self.rows or self.is_first or self.finish_reason)


def _num_logprobs(scored: TokenLogprob | None) -> int:
    """Of a token and its alternatives. All tokens of an answer have as many."""
    return 1 + (len(scored.top) if scored else 0)


def spell_prompt(prompt_token_ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """What each token of a prompt adds to its text; special tokens too: the client sent them."""
    # Not flushed: the detokeniser of the output completes a character that the prompt begins.
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=False)
    return [detokenizer.feed(token_id) for token_id in prompt_token_ids]


class Choice:
    """Feed it every RequestOutput of its sequence, in order. `must_abort`: it ended here, but not at the front yet.

    `echoed`: what spell_prompt() says, for a request that wants an echo. `thoughts`: tells what a thinking model writes
    before its answer apart from it. `calls` finds those that the request allows.
    """

    def __init__(
        self,
        index: int,
        request: CompletionRequest | ChatCompletionRequest,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        tokenizer: Tokenizer,
        eos_token_ids: Sequence[int] = (),
        echoed: Sequence[str] = (),
        thoughts: ReasoningSplitter | None = None,
        calls: ToolCallParser | None = None,
    ) -> None:
        self.index = index
        self.prompt_token_ids = tuple(prompt_token_ids)
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self.must_abort = False
        self._request = request
        self._params = params
        self._eos = frozenset() if request.ignore_eos else frozenset(eos_token_ids)
        self._tokenizer = tokenizer
        self._stop = StopChecker(request.stop, request.include_stop_str_in_output)
        self._calls = calls
        self._detokenizer = IncrementalDetokenizer(
            tokenizer,
            skip_special_tokens=request.skip_special_tokens,
            prompt_ids=self.prompt_token_ids,
            shown=(calls.marks if calls else ()) + (MARKS if thoughts else ()),
        )
        self._echoed = echoed
        self._thoughts = thoughts
        self._starts: list[int] = []  # where the text of each token begins, if some of them may be a thought
        self._is_started = False
        self._offset = 0
        self._routed: list[RoutedExperts] = []

    @property
    def num_reasoning_tokens(self) -> int:
        """Of a thought, the tokens of its marks among them."""
        end = self._thoughts.end if self._thoughts else 0
        return len(self._starts) if end is None else bisect_left(self._starts, end)

    def effort(self, output: RequestOutput) -> int:
        """How long feed() takes with it, in the unit of ChoiceDelta.size: prompts are echoed, routed experts joined."""
        echoed = 0 if self._is_started else LOGPROB_CHARS * len(self._echoed)
        return echoed + len(output.token_ids) + len(self._routed)

    def feed(self, output: RequestOutput) -> ChoiceDelta:
        """What the client may see of it. Outputs after the end are ignored: an abort takes a moment to arrive."""
        if self.finish_reason is not None:
            return ChoiceDelta(self.index)
        is_first, self._is_started = not self._is_started, True
        self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        text, rows = self._echo(output) if is_first and self._request.is_echo else ("", [])
        if output.routed_experts:
            self._routed.append(output.routed_experts)
        shown, new_rows = self._take(output)
        rest = self._rest() if output.finish_reason else ""
        self._finish(output)
        if self._thoughts:
            self._starts += [row.text_offset - len(text) for row in new_rows]
        reasoning, answer = self._split(shown + rest)
        shown, calls = self._tell_calls(answer)
        return ChoiceDelta(
            index=self.index,
            text=text + shown,
            reasoning=reasoning,
            token_ids=output.token_ids[: len(new_rows)] if self._request.return_token_ids else (),
            rows=tuple(rows + new_rows) if self._params.logprobs is not None else (),
            is_first=is_first,
            prompt_token_ids=self.prompt_token_ids if is_first else (),
            prompt_logprobs=output.prompt_logprobs,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            routed_experts=self._all_routed(),
            tool_calls=calls,
            has_called=self._calls is not None and self._calls.num_calls > 0,
        )

    def _echo(self, output: RequestOutput) -> tuple[str, list[TokenRow]]:
        """The prompt as text and, where log-probabilities are asked for, its rows."""
        text, rows = "".join(self._echoed), []
        if self._params.logprobs is not None:
            known = output.prompt_logprobs or (None,) * len(self.prompt_token_ids)
            offsets = accumulate(map(len, self._echoed), initial=0)
            rows = [TokenRow(*row) for row in zip(self.prompt_token_ids, known, offsets, strict=False)]
        self._offset = len(text)
        return text, rows

    def _take(self, output: RequestOutput) -> tuple[str, list[TokenRow]]:
        """The tokens up to a stop string: text that may be shown, one row per token."""
        shown, rows = "", []
        logprobs = output.logprobs or (None,) * len(output.token_ids)
        for token_id, logprob in zip(output.token_ids, logprobs, strict=True):
            rows.append(TokenRow(token_id, logprob, self._offset))
            self.num_tokens += 1
            is_last = len(rows) == len(output.token_ids)
            piece = "" if is_last and self._is_hidden(token_id, output) else self._detokenizer.feed(token_id)
            self._offset += len(piece)
            # As vLLM: a stop string counts only in text behind min_tokens.
            shown += piece if self.num_tokens <= self._params.min_tokens else self._stop.feed(piece)
            if self._stop.matched is not None:
                break
        return shown, rows

    def _is_hidden(self, token_id: int, output: RequestOutput) -> bool:
        """The token that ended the sequence is no part of the text, unless the request wants it."""
        is_stop = output.finish_reason == "stop" and token_id in self._params.stop_token_ids
        return is_stop and not self._request.include_stop_str_in_output

    def _rest(self) -> str:
        """What is still held when the sequence ends; nothing behind a stop string."""
        if self._stop.matched is not None:
            return ""
        return self._stop.feed(self._detokenizer.flush()) + self._stop.flush()

    def _split(self, shown: str) -> tuple[str, str]:
        """(thought, answer) in what may be shown."""
        if self._thoughts is None:
            return "", shown
        thought, answer = self._thoughts.feed(shown, self.finish_reason is not None)
        is_told = isinstance(self._request, ChatCompletionRequest) and self._request.include_reasoning
        return thought if is_told else "", answer

    def _tell_calls(self, text: str) -> tuple[str, tuple[ToolCallDelta, ...]]:
        """Content and calls in what may be shown."""
        if self._calls is None:
            return text, ()
        content, calls = self._calls.feed(text)
        return content + (self._calls.flush() if self.finish_reason else ""), calls

    def _finish(self, output: RequestOutput) -> None:
        if self._stop.matched is not None:
            self.finish_reason, self.stop_reason = "stop", self._stop.matched
            self.must_abort = output.finish_reason is None
            return
        self.finish_reason = output.finish_reason
        last = output.token_ids[-1] if output.token_ids else None
        if self.finish_reason == "stop" and last in self._params.stop_token_ids and last not in self._eos:
            self.stop_reason = last

    def _all_routed(self) -> RoutedExperts | None:
        """Of the whole choice, at its end."""
        is_wanted = self.finish_reason is not None and self._routed
        return RoutedExperts.joined(self._routed) if is_wanted else None


def merge(deltas: Sequence[ChoiceDelta]) -> ChoiceDelta:
    """The deltas of one choice (at least one) as one: the whole answer."""
    first = deltas[0]
    last = next((delta for delta in deltas if delta.finish_reason is not None), deltas[-1])
    return replace(
        first,
        text="".join(delta.text for delta in deltas),
        reasoning="".join(delta.reasoning for delta in deltas),
        token_ids=tuple(token_id for delta in deltas for token_id in delta.token_ids),
        rows=tuple(row for delta in deltas for row in delta.rows),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        routed_experts=last.routed_experts,
        tool_calls=join_calls(tuple(call for delta in deltas for call in delta.tool_calls)),
        has_called=deltas[-1].has_called,
    )
