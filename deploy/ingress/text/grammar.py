"""What a request asks an answer to look like, as a grammar of llguidance. Runs in a sandbox: what it is given may be
anything. Whether the grammar can be compiled shows when it is tried out (cluster/models/grammars.py).
"""

import json
from collections.abc import Callable
from typing import Any, Literal

from llguidance import LLMatcher, regex_to_lark
from llguidance.gbnf_to_lark import any_to_lark

from cluster.models.grammars import GrammarError
from deploy.ingress.text.reasoning import BEGIN, END

# Where JSON allows white space: a blank, or a new line and its indent. A model that likes blanks would write no end of
# them.
WHITESPACE = r"( |\n[ \t]{0,32})"
OPTIONS: Any = {"whitespace_flexible": True, "whitespace_pattern": WHITESPACE, "lenient": False}
OWN_KEY = "x-guidance"
TEXT = r"TEXT: /(.|\n)*/"

Schema = dict[str, Any]
Thought = Literal["no", "maybe", "begun"]


class GrammarWriter:
    """`added`: the tokens that a tokenizer finds in texts before all others, such as <tool_call>. A grammar has to name
    them as tokens; as letters they would never fit.
    """

    def __init__(self, added: frozenset[str] = frozenset()) -> None:
        self._added = added
        self._kinds: dict[str, Callable[[Any], str]] = {
            "json": self._of_schema,
            "regex": lambda regex: f"start: /{regex_to_lark(regex)}/\n",
            "choice": self._of_choice,
            "grammar": self._of_grammar,
            "structural_tag": lambda value: self._of_tags(**value),
            "tools": lambda value: self._of_tools(**value),
        }

    def write(self, kind: str, value: Any, thought: Thought = "no") -> str:
        """`kind` is "json" (a JSON schema), "regex", "choice" (a list of texts), "grammar" (GBNF or Lark),
        "structural_tag" (see _of_tags) or "tools" (see _of_tools). `thought`: whether the prompt has begun one, or
        the model may think, before the answer. Raises GrammarError.
        """
        answer = self._kinds[kind](value)
        return answer if thought == "no" else self._behind_thought(answer, is_begun=thought == "begun")

    def _behind_thought(self, answer: str, is_begun: bool) -> str:
        """The answer as a grammar of its own: its rules may have any names."""
        rules = self._behind_text("thought", END, "BLANK?")
        start = "thought @answer" if is_begun else f"({self._literal(BEGIN)} thought)? @answer"
        main = "\n".join([f"start: {start}", *rules, TEXT, r"BLANK: /[ \n]{1,4}/", ""])
        own = json.loads(answer)["grammars"][0] if answer.startswith("{") else {"lark_grammar": answer}
        named = {key: item for key, item in own.items() if item is not None} | {"name": "answer"}
        return json.dumps({"grammars": [{"name": "main", "lark_grammar": main}, named]}, ensure_ascii=False)

    def _of_schema(self, schema: Schema) -> str:
        return str(LLMatcher.grammar_from_json_schema(schema, overrides=OPTIONS))  # its errors are clearer than Lark's

    def _of_grammar(self, text: str) -> str:
        try:
            return str(LLMatcher.grammar_from_lark(any_to_lark(text)))
        except Exception as error:  # the converter raises what it likes
            raise GrammarError(f"it is neither GBNF nor Lark: {error}") from None

    def _of_choice(self, choices: list[str]) -> str:
        # One terminal: as alternatives of a rule, thousands of texts would take seconds.
        return f"start: CHOICE\nCHOICE: {' | '.join(map(_quoted, choices))}\n"

    def _of_tags(self, tags: list[dict[str, Any]], triggers: list[str]) -> str:
        """Free text, in which a trigger begins a tag: its `begin`, JSON of its `schema`, its `end`."""
        rules = []
        for number, tag in enumerate(tags):
            trigger = next((each for each in triggers if tag["begin"].startswith(each)), None)
            if trigger is None:
                raise GrammarError(f"begin={tag['begin']!r:.60} begins with none of the triggers")
            rest = self._literal(tag["begin"][len(trigger) :])
            rules += self._behind_text(
                f"tag_{number}", trigger, f"{rest} {_json(tag['schema'])} {self._literal(tag['end'])}"
            )
        any_tag = " | ".join(f"tag_{number}" for number in range(len(tags)))
        return "\n".join([f"start: ({any_tag})* TEXT", TEXT, *rules, ""])

    def _of_tools(
        self,
        begin: str,
        end: str,
        is_list: bool,
        tools: list[dict[str, Any]],
        may_talk: bool,
        most: int | None,
        content: Schema | None,
    ) -> str:
        """Calls of tools, in the form of their marks. `may_talk`: free text may stand in their place, and before them.
        `content`: JSON of this schema may stand in their place.
        """
        rules = [f"call: {' | '.join(f'call_{number}' for number in range(len(tools)))}", r"BLANK: /[ \n]{1,2}/"]
        for number, tool in enumerate(tools):
            head = f'{{"name": {json.dumps(tool["name"])}, "arguments": '
            rules.append(f'call_{number}: {_quoted(head)} {_json(tool["schema"])} "}}"')
        more = "" if most == 1 else '("," BLANK? call)*'
        body = f'BLANK? "[" call {more} "]"' if is_list else f"BLANK? call BLANK? {self._literal(end)}"
        if may_talk:
            rules += [*self._behind_text("block", begin, body), TEXT]
            rules.append("start: block | TEXT" if most == 1 else "start: block* TEXT")
        else:
            more = "" if most == 1 or is_list else "(BLANK? block)*"
            rules.append(f"block: {self._literal(begin)} {body}")
            rules.append(f"start: block {more}" if content is None else f"start: block {more} | {_json(content)}")
        return "\n".join([*rules, ""])

    def _behind_text(self, name: str, trigger: str, rest: str) -> list[str]:
        """Rules of `name`: any text up to the trigger, the trigger, and `rest`."""
        if trigger in self._added:
            return [f"{name}: TEXT {trigger} {rest}"]
        return [f"{name}_begin[lazy]: TEXT {_quoted(trigger)}", f"{name}: {name}_begin {rest}"]

    def _literal(self, text: str) -> str:
        return text if text in self._added else _quoted(text) if text else ""


def _quoted(text: str) -> str:
    """A text as Lark writes it."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _json(schema: Schema) -> str:
    """What stands for JSON of a schema in a rule of Lark. References in it begin at this schema."""
    return f"%json {json.dumps(schema | {OWN_KEY: OPTIONS}, ensure_ascii=False)}"
