"""Tool calls in the text of a model: `{"name": ..., "arguments": {...}}` behind a mark, found as the text comes.

The forms differ in their marks (ToolFormat). Arguments are passed on as they are written, so what a client gets is the
model's own JSON. Text that begins like a call and is none is content. Knows no HTTP and no grammar.
"""

import secrets
from dataclasses import dataclass, replace

from deploy.ingress.text.json_call import BLANKS, JsonCall
from deploy.ingress.text.tokens import Tokenizer


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a family writes calls: each object between `begin` and `end`, or behind `begin` a list of all of them."""

    name: str
    begin: str
    end: str = ""
    is_list: bool = False


FORMATS = {
    "hermes": ToolFormat("hermes", "<tool_call>", "</tool_call>"),  # Qwen3, Granite 4 and Hermes
    "granite": ToolFormat("granite", "<|tool_call|>", is_list=True),  # Granite 3
}


def find_format(setting: str, tokenizer: Tokenizer) -> ToolFormat | None:
    """The form that the setting `tool_call_parser` names; auto: the one whose mark the chat template mentions, or else
    the one whose mark is a token, if the template knows tools at all. None: calls can't be read.
    """
    if setting in FORMATS:
        return FORMATS[setting]
    source = tokenizer.template.source if tokenizer.template else ""
    if setting == "none" or "tools" not in source:
        return None
    mentioned = [each for each in FORMATS.values() if each.begin in source]
    known = [each for each in FORMATS.values() if tokenizer.backend.token_to_id(each.begin) is not None]
    return next(iter(mentioned + known), None)


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """What is new of a call. The first one has its id and name."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


def join_calls(deltas: tuple[ToolCallDelta, ...]) -> tuple[ToolCallDelta, ...]:
    """One for each call."""
    calls: dict[int, list[ToolCallDelta]] = {}
    for delta in deltas:
        calls.setdefault(delta.index, []).append(delta)
    return tuple(replace(parts[0], arguments="".join(part.arguments for part in parts)) for parts in calls.values())


class ToolCallParser:
    """Feed it text; get content, and what is new of calls. `most`: later calls are dropped."""

    def __init__(self, form: ToolFormat, most: int | None = None) -> None:
        self._form = form
        self._most = most
        self._look = self._look_for_mark
        self._held = ""  # text that can't be told apart yet
        self._blanks: list[str] = []  # that are content only if content follows
        self._has_said = False
        self._raw = ""  # what would be content if no call came of it
        self._call: JsonCall | None = None
        self._content: list[str] = []
        self._deltas: list[ToolCallDelta] = []
        self.num_calls = 0

    @property
    def marks(self) -> tuple[str, ...]:
        """What it has to see in a text, even where they are special tokens."""
        return self._form.begin, self._form.end

    def feed(self, text: str) -> tuple[str, tuple[ToolCallDelta, ...]]:
        self._held += text
        while self._held and self._look():
            pass
        return self._take()

    def flush(self) -> str:
        """The text has ended: what was held, and is no part of a call."""
        if self._look != self._look_behind_call and not (self._call and self._call.is_begun):
            self._say(self._raw + self._held)
        if not self.num_calls:
            self._content += self._blanks
        self._held, self._raw, self._blanks = "", "", []
        return self._take()[0]

    def _take(self) -> tuple[str, tuple[ToolCallDelta, ...]]:
        told = "".join(self._content), tuple(self._deltas)
        self._content, self._deltas = [], []
        return told

    def _say(self, text: str) -> None:
        self._blanks.append(text)
        if self._has_said or text.strip(BLANKS):
            self._content += self._blanks
            self._blanks, self._has_said = [], True

    # Each looks at what is held, and returns whether there may be more to see.

    def _look_for_mark(self) -> bool:
        before, mark, rest = self._held.partition(self._form.begin)
        if not mark:
            before, self._held = _split(self._held, self._form.begin)
            self._say(before)
            return False
        self._say(before)
        self._held, self._raw, self._look = rest, mark, self._look_behind_mark
        return True

    def _look_behind_mark(self) -> bool:
        rest = self._held.lstrip(BLANKS + "[" if "[" not in self._raw else BLANKS)
        self._raw, self._held = self._raw + self._held[: len(self._held) - len(rest)], rest
        if not rest:
            return False
        if rest.startswith("{"):
            self._call, self._look = JsonCall(), self._look_at_call
        else:
            self._give_up()
        return True

    def _look_at_call(self) -> bool:
        call = self._call
        assert call is not None
        arguments, used = call.feed(self._held)
        self._raw, self._held = self._raw + self._held[:used], self._held[used:]
        if call.is_certain and (self._most is None or call.is_begun or self.num_calls < self._most):
            self._tell(call, arguments)
        if call.is_over and not call.name:
            self._give_up()
        elif call.is_over:
            self._call, self._look, self._blanks, self._has_said = None, self._look_behind_call, [], False
        return call.is_over

    def _tell(self, call: JsonCall, arguments: str) -> None:
        is_new, call.is_begun = not call.is_begun, True
        self.num_calls += is_new
        first = {"id": f"call_{secrets.token_hex(12)}", "name": call.name} if is_new else {}
        if is_new or arguments:
            self._deltas.append(ToolCallDelta(self.num_calls - 1, arguments, **first))

    def _look_behind_call(self) -> bool:
        """Between calls stand blanks, commas, brackets and marks."""
        begin, end = self._form.begin, self._form.end
        if not self._held.strip(BLANKS):
            self._blanks.append(self._held)
            self._held = ""
            return False
        is_list = "[" in self._raw[: self._raw.find("{")]
        rest = self._held.lstrip(BLANKS + ",]" if is_list else BLANKS)
        if is_list and rest.startswith("{"):
            self._held, self._raw, self._look = rest, f"{begin}[", self._look_behind_mark
        elif end and rest.startswith(end):
            self._held = rest[len(end) :]
        elif rest.startswith(begin) or not any(mark.startswith(rest) for mark in (begin, end) if mark):
            self._raw, self._look = "", self._look_for_mark
        else:
            return False
        return True

    def _give_up(self) -> None:
        """It is no call."""
        raw, self._raw, self._call, self._look = self._raw, "", None, self._look_for_mark
        self._say(raw)


def _split(text: str, mark: str) -> tuple[str, str]:
    """What can't belong to a mark, and what may begin one."""
    for size in range(min(len(text), len(mark) - 1), 0, -1):
        if mark.startswith(text[-size:]):
            return text[:-size], text[-size:]
    return text, ""
