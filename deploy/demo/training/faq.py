"""The FAQ as data: what faq.yaml says, checked. Knows nothing about tokens or models."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FAQ_FILE = Path(__file__).with_name("faq.yaml")


@dataclass(frozen=True)
class Entry:
    """One answer and the ways to ask for it. `questions[0]` is the canonical phrasing; `held_out` is never
    trained on. `topics`, `actions` and `events` fill the templates in augment.py."""

    id: str
    answer: str
    questions: tuple[str, ...]
    held_out: tuple[str, ...]
    topics: tuple[str, ...] = ()
    actions: tuple[str, ...] = ()
    events: tuple[str, ...] = ()


def normalise(question: str) -> str:
    """Two phrasings are the same question for the FAQ if they differ only in case and outer punctuation."""
    return " ".join(question.lower().split()).strip("?!. ")


def load_faq(path: Path = FAQ_FILE) -> list[Entry]:
    """Read faq.yaml. Raises ValueError with the entry's id for a wrong key or a value that is not text."""
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    return [_entry(item) for item in raw]


def _entry(item: dict[str, Any]) -> Entry:
    lists: dict[str, Any] = {k: tuple(v) for k, v in item.items() if isinstance(v, list)}
    texts: dict[str, Any] = {k: v for k, v in item.items() if isinstance(v, str)}
    wrong = [v for values in lists.values() for v in values if not isinstance(v, str)]
    if wrong or len(lists) + len(texts) != len(item):
        raise ValueError(f"faq entry {item.get('id')!r}: every value must be text, quote it in faq.yaml: {wrong}")
    try:
        return Entry(**texts, **lists)
    except TypeError as error:
        raise ValueError(f"faq entry {item.get('id')!r}: {error}") from None
