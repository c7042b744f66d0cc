"""What a thinking model writes before its answer, `<think>...</think>`, told apart from the answer as the text comes.

A model thinks if its chat template mentions the mark's end. Templates begin the thought themselves, or leave that to
the model, or end it at once (`enable_thinking=false` of Qwen3): the prompt tells. Knows no HTTP.
"""

from collections.abc import Sequence

from deploy.ingress.text.tokens import Tokenizer

MARKS = BEGIN, END = "<think>", "</think>"
# As many tokens of a prompt are enough to see whether it ends with a mark.
TAIL = 16


def may_think(tokenizer: Tokenizer) -> bool:
    """Whether answers of this model may begin with a thought."""
    return tokenizer.template is not None and END in tokenizer.template.source


def is_begun(prompt_token_ids: Sequence[int], tokenizer: Tokenizer, continues_message: bool = False) -> bool:
    """Whether the prompt has begun a thought, which the model goes on with. Where it goes on with a message, the mark
    need not be the last thing in it; elsewhere a mark further up is somebody's text.
    """
    tail = tokenizer.decode(prompt_token_ids[-TAIL:], skip_special_tokens=False)
    _, mark, behind = tail.rpartition(BEGIN)
    return mark != "" and (END not in behind if continues_message else not behind.strip())


class ReasoningSplitter:
    """Feed it text; get what is new of the thought and of the answer. Blanks around a thought belong to neither.
    `end`: how many characters came before the answer, the thought's marks among them; None while that is not known.
    """

    def __init__(self, is_begun: bool) -> None:
        self._look = self._think if is_begun else self._begin
        self._held = ""  # text that can't be told apart yet
        self._thought: list[str] = []
        self._answer: list[str] = []
        self._has_thought = False
        self._num_fed = 0
        self.end: int | None = None

    def feed(self, text: str, is_last: bool) -> tuple[str, str]:
        """(thought, answer)"""
        self._held += text
        self._num_fed += len(text)
        while self._look(is_last):
            pass
        told = "".join(self._thought), "".join(self._answer)
        self._thought, self._answer = [], []
        return told

    # Each looks at what is held, and returns whether there may be more to see.

    def _begin(self, is_last: bool) -> bool:
        text = self._held.lstrip()
        if text.startswith(BEGIN):
            self._held, self._look = text.removeprefix(BEGIN), self._think
            return True
        if BEGIN.startswith(text) and not is_last:
            return False
        self._look, self.end = self._say, 0
        return True

    def _think(self, is_last: bool) -> bool:
        before, mark, rest = self._held.partition(END)
        if not mark:
            kept = 0 if is_last else _length_of_beginning(before)
            before, rest = before[: len(before) - kept], before[len(before) - kept :]
        blanks = "" if mark or is_last else before[len(before.rstrip()) :]
        shown = before.rstrip() if mark or is_last or blanks else before
        self._tell(shown)
        self._held = blanks + rest
        if mark:
            self._look, self.end = self._skip_blanks, self._num_fed - len(rest)
        return bool(mark)

    def _tell(self, text: str) -> None:
        text = text if self._has_thought else text.lstrip()
        self._has_thought |= bool(text)
        self._thought.append(text)

    def _skip_blanks(self, is_last: bool) -> bool:
        self._held = self._held.lstrip()
        if self._held:
            self._look = self._say
        return bool(self._held)

    def _say(self, is_last: bool) -> bool:
        self._answer.append(self._held)
        self._held = ""
        return False


def _length_of_beginning(text: str) -> int:
    """How many of its last characters may be the beginning of END."""
    return next((size for size in range(min(len(END) - 1, len(text)), 0, -1) if END.startswith(text[-size:])), 0)
