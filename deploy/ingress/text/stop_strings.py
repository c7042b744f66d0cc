"""Stop strings: where a text that comes bit by bit is cut."""

from collections.abc import Sequence
from functools import lru_cache


class StopChecker:
    """Cuts a text at the stop string that is complete first, however the text is split into deltas.

    Of several that end at the same place the one that begins first counts. `matched` is the stop string found.
    """

    def __init__(self, stop: Sequence[str], include_stop: bool = False) -> None:
        self._searches = [_Search(each) for each in stop]
        self._include_stop = include_stop
        self._held = ""
        self.matched: str | None = None

    def feed(self, delta: str) -> str:
        """The text that may be shown now: no stop string can begin in it any more."""
        if self.matched is not None:
            return ""
        text, before = self._held + delta, len(self._held)
        ends = [(before + end, search.word) for search in self._searches if (end := search.feed(delta))]
        if ends:
            end, start, self.matched = min((end, end - len(word), word) for end, word in ends)
            self._held = ""
            return text[: end if self._include_stop else start]
        shown = len(text) - max((search.length for search in self._searches), default=0)
        self._held = text[shown:]
        return text[:shown]

    def flush(self) -> str:
        """What was held back, when the text has ended without a stop string."""
        held, self._held = self._held, ""
        return held


class _Search:
    """Looks for a word in a text that comes bit by bit, in a time that does not grow with the word's length
    (Knuth, Morris and Pratt). `length` is that of the longest end of the text that begins the word.
    """

    def __init__(self, word: str) -> None:
        self.word = word
        self.length = 0
        self._borders = _borders(word)

    def feed(self, delta: str) -> int | None:
        """How much of `delta` there is up to the end of the word, once the word is complete."""
        if not self.length and self.word[0] not in delta:
            return None
        for end, character in enumerate(delta, start=1):
            while self.length and self.word[self.length] != character:
                self.length = self._borders[self.length - 1]
            self.length += self.word[self.length] == character
            if self.length == len(self.word):
                return end
        return None


@lru_cache(maxsize=256)
def _borders(word: str) -> tuple[int, ...]:
    """For each beginning of a word: the length of its longest end, itself aside, that begins the word as well."""
    found = [0]
    for character in word[1:]:
        length = found[-1]
        while length and word[length] != character:
            length = found[length - 1]
        found.append(length + (word[length] == character))
    return tuple(found)
