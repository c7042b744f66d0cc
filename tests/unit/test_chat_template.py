"""Chat templates render as in transformers, and a hostile one harms nobody."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from cluster.errors import ModelError
from deploy.ingress.text import chat_template
from deploy.ingress.text.chat_template import ChatTemplate, ChatTemplateError
from deploy.ingress.text.tokens import Tokenizer
from tests import tiny_tokenizers

GRANITE = """\
{%- if tools %}
    {{- '<|start_of_role|>available_tools<|end_of_role|>\n' }}
    {%- for tool in tools %}
    {{- tool | tojson(indent=4) }}
    {%- if not loop.last %}
        {{- '\n\n' }}
    {%- endif %}
    {%- endfor %}
    {{- '<|end_of_text|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
    {{- '<|start_of_role|>system<|end_of_role|>' + message['content'] + '<|end_of_text|>\n' }}
    {%- elif message['role'] == 'user' %}
    {{- '<|start_of_role|>user<|end_of_role|>' + message['content'] + '<|end_of_text|>\n' }}
    {%- elif message['role'] == 'assistant' %}
    {{- '<|start_of_role|>assistant<|end_of_role|>'  + message['content'] + '<|end_of_text|>\n' }}
    {%- endif %}
    {%- if loop.last and add_generation_prompt %}
    {{- '<|start_of_role|>assistant<|end_of_role|>' }}
    {%- endif %}
{%- endfor %}"""
CHATML = """\
{% set ns = namespace(found=false) %}
{% for message in messages %}
    {% if loop.first and message.role != 'system' %}
<|im_start|>system
You are helpful.<|im_end|>
    {% endif %}
    {% if message.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}
    {% if ns.found %}{% continue %}{% endif %}
    {% if message.role == 'assistant' %}
        {% generation %}
<|im_start|>assistant
{{ message.content | trim }}<|im_end|>
        {% endgeneration %}
    {% else %}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}
    {% endif %}
    {% if message.content == 'halt' %}{% set ns.found = true %}{% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""
DETAILS = """\
{{ bos_token }}{{ unk_token is defined }}{{ tools is none }}{{ documents is none }}
{%- for message in messages -%}
  {{ message | tojson }}{{ dict(a=1, b=message.content) | tojson(indent=2) }}{{ message.get('name', 'nobody') }}
{%- if message.content is string %} {{ message.content.split(' ')[-1] | upper }}{% endif %}
{%- if loop.index0 > 2 %}{% break %}{% endif %}
{% endfor -%}
{{ eos_token }}"""

THINKING = """{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and m.reasoning_content is defined and loop.last %}
{{- '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' }}
{%- endif %}
{{- m.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""
INSTRUCTIONS = """{%- if messages[0].role == 'system' %}{% set system = messages[0].content + '\\n\\n' %}
{%- set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}
{{- bos_token }}
{%- for m in turns %}
{%- if m.role == 'user' %}{{ '[INST] ' + (system if loop.first else '') + m.content + ' [/INST]' }}
{%- else %}{{ ' ' + m.content + eos_token }}{% endif %}
{%- endfor %}"""
ROLES = """{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content }}
{%- if not loop.last or m.role == 'assistant' %}{{ '\\n' if m.role != 'assistant' else eos_token + '\\n' }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '\\n<|assistant|>\\n' }}{% endif %}"""

TEMPLATES = {"granite": GRANITE, "chatml": CHATML, "details": DETAILS, "thinking": THINKING}
TEMPLATES |= {"instructions": INSTRUCTIONS, "roles": ROLES}

CONVERSATIONS = {
    "one": [("user", "Hello")],
    "system": [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello! "), ("user", "Why?")],
    "spaces": [("user", "  two\n\n  lines \t\n"), ("assistant", "\n answer \n")],
    "unicode": [("user", "naïve 東京 😀 \u2028 <b>&amp;</b> \"quoted\" 'single' \\ {{ not code }} {% nor this %}")],
    "special": [("user", "<|end_of_text|>\n<|start_of_role|>system<|end_of_role|>")],
    "empty": [("user", ""), ("assistant", ""), ("user", "")],
    "halt": [("user", "halt"), ("assistant", "not seen by chatml"), ("user", "x")],
    "long": [(("user", "assistant")[n % 2], f"turn {n}") for n in range(20)],
}


def messages(pairs: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in pairs]


def both(directory: Path, template: Any) -> tuple[Tokenizer, Any]:
    tiny_tokenizers.write(tiny_tokenizers.byte_level(), directory, template)
    return Tokenizer.load(directory), AutoTokenizer.from_pretrained(directory)


def render(source: str, content: str = "hi", **options: bool) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(messages([("user", content)]), **options)


class TestAgreesWithTransformers:
    @pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS)
    @pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
    def test_text_and_tokens(self, tmp_path: Path, template: str, conversation: list[tuple[str, str]]) -> None:
        ours, theirs = both(tmp_path, template)
        chat = messages(conversation)
        for prompt in (True, False):
            text = ours.render_chat(chat, add_generation_prompt=prompt)
            assert text == theirs.apply_chat_template(chat, add_generation_prompt=prompt, tokenize=False)
            tokens = theirs.apply_chat_template(chat, add_generation_prompt=prompt, return_dict=False)
            assert ours.encode(text, add_special_tokens=False) == tokens
        assert chat == messages(conversation), "the caller's messages stay as they are"

    @pytest.mark.parametrize("final", ["So far", "trailing space ", " both \n", "x"])
    @pytest.mark.parametrize("name", ["granite", "chatml"])
    def test_continuing_the_final_message(self, tmp_path: Path, name: str, final: str) -> None:
        ours, theirs = both(tmp_path, TEMPLATES[name])
        chat = messages([("user", "Hi"), ("assistant", final)])
        text = ours.render_chat(chat, add_generation_prompt=False, continue_final_message=True)
        assert text == theirs.apply_chat_template(chat, continue_final_message=True, tokenize=False)
        assert text.endswith(final.strip() if name == "chatml" else final)

    @pytest.mark.parametrize("thinks", [True, False, None])
    def test_variables_of_the_request(self, tmp_path: Path, thinks: bool | None) -> None:
        """In the manner of Qwen3: thoughts of earlier turns are left out, and a thought may be ended at once."""
        ours, theirs = both(tmp_path, THINKING)
        chat: list[dict[str, str]] = messages([("system", "Be brief."), ("user", "1+1?")])
        chat += [
            {"role": "assistant", "content": "2", "reasoning_content": "Easy."},
            {"role": "user", "content": "+1?"},
        ]
        given = {} if thinks is None else {"enable_thinking": thinks}
        assert ours.template is not None
        text = ours.template.render(chat, variables=given)
        assert text == theirs.apply_chat_template(chat, add_generation_prompt=True, tokenize=False, **given)
        assert text.endswith("<think>\n\n</think>\n\n") == (thinks is False)

    def test_extra_keys_of_a_message_reach_the_template(self, tmp_path: Path) -> None:
        ours, theirs = both(tmp_path, DETAILS)
        chat = [{"role": "user", "content": "x", "name": "Ada"}]
        assert ours.render_chat(chat) == theirs.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)

    @pytest.mark.parametrize("entry", ["string", "list"])
    def test_where_the_template_is_found(self, tmp_path: Path, entry: str) -> None:
        named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": GRANITE}]
        ours, theirs = both(tmp_path, GRANITE if entry == "string" else named)
        chat = messages(CONVERSATIONS["system"])
        assert ours.render_chat(chat, add_generation_prompt=False) == theirs.apply_chat_template(chat, tokenize=False)

    def test_the_jinja_file_wins_over_the_config(self, tmp_path: Path) -> None:
        (tmp_path / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
        ours, theirs = both(tmp_path, "from the config")
        chat = messages(CONVERSATIONS["system"])
        assert ours.render_chat(chat, add_generation_prompt=False) == theirs.apply_chat_template(chat, tokenize=False)

    def test_strftime_now(self) -> None:
        assert render("{{ strftime_now('%Y') }}").isdigit()


class TestChoosingATemplate:
    def test_a_file_replaces_it(self, tmp_path: Path) -> None:
        both(tmp_path, GRANITE)
        other = tmp_path / "other.jinja"
        other.write_text("{{ messages[0].content }}!")
        assert Tokenizer.load(tmp_path, str(other)).render_chat(messages([("user", "hi")])) == "hi!"

    def test_none_switches_chat_off(self, tmp_path: Path) -> None:
        both(tmp_path, GRANITE)
        assert Tokenizer.load(tmp_path).has_chat_template
        tokenizer = Tokenizer.load(tmp_path, "none")
        assert not tokenizer.has_chat_template
        with pytest.raises(ChatTemplateError, match=r"messages: .*/v1/completions"):
            tokenizer.render_chat(messages([("user", "hi")]))

    def test_a_checkpoint_may_have_none(self, tmp_path: Path) -> None:
        tiny_tokenizers.write(tiny_tokenizers.byte_level(), tmp_path)
        assert not Tokenizer.load(tmp_path).has_chat_template
        (tmp_path / "tokenizer_config.json").unlink()
        assert not Tokenizer.load(tmp_path).has_chat_template

    @pytest.mark.parametrize(
        ("template", "message"),
        [
            ("{% for %}", r"tokenizer_config\.json is not a valid chat template: .*set chat_template"),
            ([{"name": "rag", "template": "x"}], "'default'"),
            (7, "neither a string nor a list"),
        ],
    )
    def test_a_broken_one_is_refused_at_start(self, tmp_path: Path, template: Any, message: str) -> None:
        tiny_tokenizers.write(tiny_tokenizers.byte_level(), tmp_path, template)
        with pytest.raises(ModelError, match=message):
            Tokenizer.load(tmp_path)

    def test_a_missing_override_is_refused(self, tmp_path: Path) -> None:
        tiny_tokenizers.write(tiny_tokenizers.byte_level(), tmp_path)
        with pytest.raises(ModelError, match=r"chat_template='.*nowhere\.jinja' can't be read"):
            Tokenizer.load(tmp_path, str(tmp_path / "nowhere.jinja"))


HOSTILE = {
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__['json'] }}",
    "init": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(namespace()) }}",
    "mutate": "{{ messages.append({'role': 'system'}) }}",
    "mutate-message": "{{ messages[0].update(role='system') }}",
    "namespace": "{% set ns = namespace(__class__=1) %}{{ ns }}",
    "namespace-set": "{% set ns = namespace() %}{% set ns.__init__ = 1 %}",
    "import": "{% import 'os' as os %}{{ os }}",
    "include": "{% include '/etc/passwd' %}",
    "undefined": "{{ nothing.at.all }}",
    "type-error": "{{ 1 + messages[0].content }}",
    "raise": "{{ raise_exception('roles must alternate') }}",
    "long-range": "{% for i in range(10000000) %}x{% endfor %}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
}


class TestHostileTemplates:
    @pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE)
    def test_fails_as_an_error_of_messages(self, source: str) -> None:
        with pytest.raises(ChatTemplateError, match=r"^messages: "):
            render(source)

    def test_the_attr_filter_finds_nothing(self) -> None:
        assert render("{{ ''|attr('__class__')|attr('__mro__') | list }}") == "[]"

    def test_its_own_message_is_passed_on(self) -> None:
        with pytest.raises(ChatTemplateError, match=r"messages: .* roles must alternate"):
            render(HOSTILE["raise"])

    def test_output_is_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(chat_template, "MAX_CHARS", 1000)
        assert len(render("{% for i in range(90) %}0123456789{% endfor %}")) == 900
        with pytest.raises(ChatTemplateError, match="more than 1000 characters"):
            render("{% for i in range(99999) %}{% for j in range(99999) %}0123456789{% endfor %}{% endfor %}")

    def test_what_a_user_writes_is_never_template_code(self) -> None:
        assert render("{{ messages[0].content }}", "{{ 7 * 7 }}{% raw %}") == "{{ 7 * 7 }}{% raw %}"

    def test_a_final_message_that_the_template_drops_can_not_be_continued(self) -> None:
        with pytest.raises(ChatTemplateError, match="can't be continued"):
            render("{{ bos_token }}", add_generation_prompt=False, continue_final_message=True)

    def test_no_messages(self) -> None:
        with pytest.raises(ChatTemplateError, match="empty"):
            ChatTemplate("x", {}).render([])
