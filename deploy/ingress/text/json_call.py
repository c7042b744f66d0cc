"""One call of a tool, `{"name": ..., "arguments": ...}`, read character by character as a model writes it."""

import json

BLANKS = " \n\r\t"


class JsonCall:
    """Reads `{"name": ..., "arguments": ...}` as it comes. `is_over` with no name: it is none.

    Arguments come out as they are written, as soon as the name is known; a text of JSON in their place is unpacked.
    Until `is_certain` it may still turn out to be none. What is read is kept in pieces: a call may be long.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.is_begun = False
        self.is_over = False
        self._state = "open"
        self._key = ""  # of the value that is read
        self._letters: list[str] = []  # of a key
        self._value: list[str] = []
        self._is_in_text = self._is_escaped = False
        self._depth = 0
        self._pending: list[str] = []  # arguments that were not passed on yet
        self._has_arguments = False

    def feed(self, text: str) -> tuple[str, int]:
        """Arguments to pass on, and how many characters belong to the call."""
        used = 0
        while used < len(text) and not self.is_over:
            self._step(text[used])
            used += 1
        if not self.is_certain:
            return "", used
        told, self._pending = "".join(self._pending), []
        return told, used

    @property
    def is_certain(self) -> bool:
        """It has a name, and arguments that are an object, as far as they have come."""
        return self.name is not None and (self._has_arguments or self.is_over)

    def _step(self, character: str) -> None:
        if self._state == "value":
            self._step_value(character)
        elif self._state == "key":
            self._step_key(character)
        elif character in BLANKS:
            return
        elif self._state == "open" and character == "{":
            self._state = "first"
        elif self._state in ("first", "more") and character == '"':
            self._state, self._letters = "key", ['"']
        elif self._state == "colon" and character == ":":
            self._state, self._value = "value", []
        elif self._state == "next" and character == ",":
            self._state = "more"
        else:
            self._end(is_good=character == "}" and self._state in ("first", "next"))

    def _step_key(self, character: str) -> None:
        self._letters.append(character)
        if self._is_escaped or character == "\\":
            self._is_escaped = not self._is_escaped
        elif character == '"':
            self._state, self._key = "colon", "".join(self._letters)

    def _step_value(self, character: str) -> None:
        if not self._value and character in BLANKS:
            return
        is_scalar = bool(self._value) and self._value[0] not in '{["'
        if is_scalar and not self._depth and character in BLANKS + ",}":
            self._take_value()
            self._step(character)
            return
        self._add(character)
        if self._is_in_text:
            if self._is_escaped or character == "\\":
                self._is_escaped = not self._is_escaped
            elif character == '"':
                self._is_in_text = False
        elif character == '"':
            self._is_in_text = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
        if not self._is_in_text and not self._depth and self._value[0] in '{["':
            self._take_value()

    @property
    def _is_arguments(self) -> bool:
        return self._key in ('"arguments"', '"parameters"')

    def _add(self, character: str) -> None:
        if self._is_arguments and (self._value or character)[0] == "{":
            self._pending.append(character)
            self._has_arguments = True
            self._value = self._value or ["{"]  # its first character is all that is asked of it
        else:
            self._value.append(character)

    def _take_value(self) -> None:
        """A value is complete."""
        self._state = "next"
        is_name = self._key == '"name"'
        if self._value[0] == "{" or not (is_name or self._is_arguments):
            return
        try:
            value = json.loads("".join(self._value))
            if self._is_arguments and isinstance(value, str) and value.strip():
                self._take_text(value)
            elif self._is_arguments and value is not None and not isinstance(value, str):
                self._end(is_good=False)
        except (ValueError, RecursionError):
            self._end(is_good=False)
            return
        if is_name and isinstance(value, str):
            self.name = value

    def _take_text(self, text: str) -> None:
        """Arguments as a text of JSON."""
        if not isinstance(json.loads(text), dict):
            self._end(is_good=False)
        else:
            self._pending.append(text)
            self._has_arguments = True

    def _end(self, is_good: bool) -> None:
        self.is_over = True
        if is_good and self.name and not self._pending and not self._has_arguments:
            self._pending = ["{}"]
        if not is_good and not self.is_begun:
            self.name = None
