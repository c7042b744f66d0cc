"""What a request asks an answer to look like, as a grammar of llguidance. Runs in a sandbox: what it is given may be
anything. Whether the grammar can be compiled shows when it is tried out (cluster/models/grammars.py).
"""

import json
from collections.abc import Callable
from typing import Any

from llguidance import LLMatcher, regex_to_lark
from llguidance.gbnf_to_lark import any_to_lark

from cluster.models.grammars import GrammarError

# Models may write white space where JSON allows it, but not without end.
WHITESPACE = r"[ \n\r\t]{1,32}"
OPTIONS: Any = {"whitespace_flexible": True, "whitespace_pattern": WHITESPACE, "lenient": False}
OWN_KEY = "x-guidance"


def as_grammar(kind: str, value: Any) -> str:
    """`kind` is "json" (a JSON schema), "regex", "choice" (a list of texts), "grammar" (GBNF or Lark),
    "structural_tag" (see of_tags) or "tools" (see text/tool_grammar.py). Raises GrammarError.
    """
    return _KINDS[kind](value)


def _of_grammar(text: str) -> str:
    try:
        return str(LLMatcher.grammar_from_lark(any_to_lark(text)))
    except Exception as error:  # the converter raises what it likes
        raise GrammarError(f"it is neither GBNF nor Lark: {error}") from None


def _of_choice(choices: list[str]) -> str:
    # One terminal: as alternatives of a rule, thousands of texts would take seconds.
    return f"start: CHOICE\nCHOICE: {' | '.join(map(quoted, choices))}\n"


def quoted(text: str) -> str:
    """A text as Lark writes it."""
    return json.dumps(text, ensure_ascii=False)


def schema_rule(schema: dict[str, Any]) -> str:
    """What stands for JSON of a schema in a rule of Lark."""
    return f"%json {json.dumps(schema | {OWN_KEY: OPTIONS}, ensure_ascii=False)}"


def _of_schema(schema: dict[str, Any]) -> str:
    return str(LLMatcher.grammar_from_json_schema(schema, overrides=OPTIONS))  # its errors are clearer than Lark's


def of_tags(tags: list[dict[str, Any]], triggers: list[str], *, most: int | None = None) -> str:
    """Free text, in which a trigger begins a tag: its `begin`, JSON of its `schema`, its `end`."""
    rules = []
    for number, tag in enumerate(tags):
        trigger = next((each for each in triggers if tag["begin"].startswith(each)), None)
        if trigger is None:
            raise GrammarError(f"begin={tag['begin']!r:.60} begins with none of the triggers")
        rest = tag["begin"][len(trigger) :]
        parts = [quoted(rest) if rest else "", schema_rule(tag["schema"]), quoted(tag["end"]) if tag["end"] else ""]
        rules.append(
            f"trigger_{number}[lazy]: TEXT {quoted(trigger)}\ntag_{number}: trigger_{number} {' '.join(parts)}"
        )
    repeat = "*" if most is None else f"{{0,{most}}}"
    any_tag = " | ".join(f"tag_{number}" for number in range(len(tags)))
    return "\n".join([f"start: ({any_tag}){repeat} text", "text: TEXT", r"TEXT: /(.|\n)*/", *rules, ""])


_KINDS: dict[str, Callable[[Any], str]] = {
    "json": _of_schema,
    "regex": lambda regex: f"start: /{regex_to_lark(regex)}/\n",
    "choice": _of_choice,
    "grammar": _of_grammar,
    "structural_tag": lambda value: of_tags(**value),
}
