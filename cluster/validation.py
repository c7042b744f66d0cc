"""Errors of pydantic, told in the words of this project: a line per field."""

import difflib
from collections.abc import Iterable

from pydantic import ValidationError


def describe(error: ValidationError, known: Iterable[str] = ()) -> str:
    """A pydantic error as one line per field: `field=value: what is wrong`. `known` names are hints."""
    lines = []
    for item in error.errors(include_url=False):
        where = ".".join(str(part) for part in item["loc"])
        shown = "" if item["type"] == "missing" or not where else f"={item['input']!r:.200}"
        if item["type"] == "extra_forbidden":
            lines.append(f"{where}{shown} is unknown{_hint(where, known)}")
            continue
        lines.append(f"{where}{shown}: {item['msg']}" if where else item["msg"].removeprefix("Value error, "))
    return "; ".join(lines)


def _hint(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f": did you mean {close[0]}?" if close else ""
