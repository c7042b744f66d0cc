"""One call of a tool, `{"name": ..., "arguments": ...}`, read character by character as a model writes it."""

import json

BLANKS = " \n\r\t"


class JsonCall:
    """Reads `{"name": ..., "arguments": ...}` as it comes. `is_over` with no name: it is none.

    Arguments come out as they are written, as soon as the name is known; a text of JSON in their place is unpacked.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.is_begun = False
        self.is_over = False
        self._state = "open"
        self._key = self._value = ""
        self._is_in_text = self._is_escaped = False
        self._depth = 0
        self._pending = ""  # arguments that came before the name
        self._has_arguments = False

    def feed(self, text: str) -> tuple[str, int]:
        """Arguments to pass on, and how many characters belong to the call."""
        used = 0
        while used < len(text) and not self.is_over:
            self._step(text[used])
            used += 1
        if self.name is None:
            return "", used
        told, self._pending = self._pending, ""
        return told, used

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
            self._state, self._key = "key", '"'
        elif self._state == "colon" and character == ":":
            self._state, self._value = "value", ""
        elif self._state == "next" and character == ",":
            self._state = "more"
        else:
            self._end(is_good=character == "}" and self._state in ("first", "next"))

    def _step_key(self, character: str) -> None:
        self._key += character
        if self._is_escaped or character == "\\":
            self._is_escaped = not self._is_escaped
        elif character == '"':
            self._state = "colon"

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
        if self._is_arguments and (self._value or character) and (self._value + character)[0] == "{":
            self._pending += character
            self._value = self._value or character  # its first character is all that is asked of it
        else:
            self._value += character

    def _take_value(self) -> None:
        """A value is complete."""
        self._state = "next"
        if self._is_arguments:
            self._has_arguments = self._value != "null"
        elif self._key != '"name"':
            return
        try:
            value = None if self._value[0] == "{" else json.loads(self._value)
        except (ValueError, RecursionError):
            self._end(is_good=False)
            return
        if self._key == '"name"' and isinstance(value, str):
            self.name = value
        elif self._is_arguments and isinstance(value, str):
            self._pending += value
        elif self._is_arguments and value is not None:
            self._end(is_good=False)

    def _end(self, is_good: bool) -> None:
        self.is_over = True
        if is_good and self.name and not self._pending and not self._has_arguments:
            self._pending = "{}"
        if not is_good and not self.is_begun:
            self.name = None
