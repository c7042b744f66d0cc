"""A checkpoint's chat template: messages in, prompt text out, byte for byte as transformers renders it.

A template comes from a checkpoint, so it is untrusted code: it runs in jinja2's immutable sandbox, sees plain
strings only, and what it writes is bounded. What it computes is not: a server renders in a process that can be ended
(deploy/ingress/sandbox.py). Knows no tokens and no HTTP.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from cluster.errors import ModelError
from cluster.models.files import MALFORMED, read_file, read_json

T = TypeVar("T")

# Far above any context window; a template that writes more is broken or hostile.
MAX_CHARS = 32 * 1024 * 1024
MAX_SOURCE_CHARS = 1024 * 1024
MAX_SOURCE_BYTES = 4 * MAX_SOURCE_CHARS
MAX_ERROR_CHARS = 500
# transformers' own mark: it ends in a space so that a template that trims the message can be told apart.
CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "


class ChatTemplateError(ValueError):
    """The template can't render these `messages`; the text says why."""


class ChatTemplate:
    """One template. `special_tokens` (bos_token, eos_token, ...) are variables in it. Raises ModelError."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], origin: str = "chat_template") -> None:
        self.source, self.special_tokens, self.origin = source, dict(special_tokens), origin
        self._template: jinja2.Template | None = None
        if len(source) > MAX_SOURCE_CHARS:
            raise self._invalid(f"it has {len(source)} characters, more than {MAX_SOURCE_CHARS}")
        self._try(lambda: _environment().parse(source))

    def arguments(self) -> dict[str, Any]:
        """What makes the same template in another process."""
        return {"source": self.source, "special_tokens": self.special_tokens, "origin": self.origin}

    def compile(self) -> jinja2.Template:
        """Not only when it is read: jinja2 computes constant expressions, however large, to compile them."""
        if self._template is None:
            self._template = self._try(lambda: _environment().from_string(self.source))
        return self._template

    def _try(self, read: Callable[[], T]) -> T:
        try:
            return read()
        except (jinja2.TemplateError, *MALFORMED) as error:
            raise self._invalid(_why(error)) from None

    def _invalid(self, why: str) -> ModelError:
        return ModelError(
            f"{self.origin} is not a valid chat template: {why}; set chat_template to another file, or to `none`"
        )

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """The prompt for a conversation. `continue_final_message` leaves the last message open for the model;
        `variables` are further ones of the template, such as `enable_thinking`.

        Raises ChatTemplateError.
        """
        if not messages:
            raise ChatTemplateError("messages=[] is empty: send at least one message")
        chat = [dict(message) for message in messages]
        if continue_final_message:
            chat[-1]["content"] += CONTINUE_TAG
        shown = {"tools": list(tools) or None, **(variables or {})}
        text = self._run(chat, add_generation_prompt and not continue_final_message, shown)
        return _cut_at_tag(text, messages[-1]["content"]) if continue_final_message else text

    def _run(self, chat: list[dict[str, Any]], add_generation_prompt: bool, more: Mapping[str, Any]) -> str:
        parts: list[str] = []
        size = 0
        variables: dict[str, Any] = {**self.special_tokens, "documents": None, **more}
        template = self.compile()
        try:
            for part in template.generate(messages=chat, add_generation_prompt=add_generation_prompt, **variables):
                size += len(part)
                if size > MAX_CHARS:
                    raise ChatTemplateError(f"messages: the chat template writes more than {MAX_CHARS} characters")
                parts.append(part)
        except ChatTemplateError:
            raise
        except Exception as error:  # a template is a program: it may fail in any way, and that is the request's error
            raise ChatTemplateError(f"messages: the model's chat template refuses them: {_why(error)}") from error
        return "".join(parts)


def _why(error: BaseException) -> str:
    """The text of an error, which the template may have written."""
    return str(error)[:MAX_ERROR_CHARS] or type(error).__name__


def load_chat_template(
    model_dir: Path, special_tokens: Mapping[str, str], override: str | None = None
) -> ChatTemplate | None:
    """The template of a checkpoint, or that of the file `override` ("none": no template). None if there is none.

    chat_template.jinja wins over tokenizer_config.json, as in transformers. Raises ModelError.
    """
    if override is not None and override.lower() == "none":
        return None
    path = Path(override) if override is not None else model_dir / "chat_template.jinja"
    if override is not None or path.exists():
        try:
            return ChatTemplate(read_file(path, MAX_SOURCE_BYTES), special_tokens, str(path))
        except ModelError:
            raise
        except (OSError, ValueError) as error:
            raise ModelError(f"chat_template={str(path)!r} can't be read: {error}") from None
    config_path = model_dir / "tokenizer_config.json"
    entry = read_json(config_path).get("chat_template") if config_path.exists() else None
    return None if entry is None else ChatTemplate(_default_of(entry, config_path), special_tokens, str(config_path))


def _default_of(entry: Any, path: Path) -> str:
    """`chat_template` of tokenizer_config.json is a template or a list of {"name", "template"}."""
    if isinstance(entry, list):
        named = {item.get("name"): item.get("template") for item in entry if isinstance(item, dict)}
        entry = named.get("default")
    if not isinstance(entry, str):
        raise ModelError(
            f"{path}: chat_template is neither a string nor a list with a template named 'default': "
            "set chat_template to a Jinja file, or to `none`"
        )
    return entry


def _cut_at_tag(text: str, final: str) -> str:
    if final.strip() not in text or CONTINUE_TAG.strip() not in text:
        raise ChatTemplateError("messages: the chat template changes the final message, so it can't be continued")
    at = text.rindex(CONTINUE_TAG.strip())
    return text[:at] if text.startswith(CONTINUE_TAG, at) else text[:at].rstrip()


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda format: datetime.now().strftime(format),
        "dict": _SafeDict(),
        "namespace": _SafeNamespace,
    }
    return environment


class _GenerationTag(Extension):
    """`{% generation %}` marks assistant tokens for training; for serving its body is ordinary template text."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's interface

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call block, not the bare body: it opens a scope, as in transformers.
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Macro) -> str:
        return caller()


class _SafeDict:
    """`dict(...)` for templates without the class itself, whose attributes lead elsewhere."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _SafeNamespace(Namespace):
    """A namespace whose attributes can't shadow Python's own."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # no named `self`: namespace(self=...) must stay possible
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_public(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        super().__setitem__(name, value)


def _check_public(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace attribute can't start with an underscore: {name!r}")


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes HTML, which would change the prompt."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
