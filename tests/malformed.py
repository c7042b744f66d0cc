"""Request bodies that must be refused, as data: the unit tests check them against the models, the HTTP tests against
a server with its default limits. A row is (id, endpoint, raw body, HTTP status, `param` of the error).
"""

import json
from typing import Any

Row = tuple[str, str, bytes, int, str | None]

COMPLETIONS, CHAT, TOKENIZE, DETOKENIZE = "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"

HUGE = 10**9
HI = [{"role": "user", "content": "Hi"}]


def _completion(name: str, param: str | None = None, **fields: Any) -> Row:
    return f"completion-{name}", COMPLETIONS, json.dumps({"prompt": "Hi"} | fields).encode(), 400, param or name


def _chat(name: str, param: str | None = None, **fields: Any) -> Row:
    return f"chat-{name}", CHAT, json.dumps({"messages": HI} | fields).encode(), 400, param or name


def _message(name: str, where: str, *messages: Any) -> Row:
    return f"message-{name}", CHAT, json.dumps({"messages": messages}).encode(), 400, where


def _raw(name: str, body: bytes, param: str | None = None, endpoint: str = COMPLETIONS) -> Row:
    return f"body-{name}", endpoint, body, 400, param


def _content(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


BODIES: list[Row] = [
    _raw("empty", b""),
    _raw("blank", b" \n"),
    _raw("no-json", b"prompt=Hi"),
    _raw("cut-off", b'{"prompt": "Hi"'),
    _raw("two-values", b'{"prompt": "Hi"} {}'),
    _raw("trailing-comma", b'{"prompt": "Hi",}'),
    _raw("list", b'[{"prompt": "Hi"}]'),
    _raw("string", b'"Hi"'),
    _raw("null", b"null"),
    _raw("not-utf8", b'{"prompt": "\xff\xfe"}'),
    _raw("utf16", '{"prompt": "Hi"}'.encode("utf-16")),
    _raw("byte-order-mark", b'\xef\xbb\xbf{"prompt": "Hi"}'),
    _raw("nan", b'{"prompt": "Hi", "temperature": NaN}'),
    _raw("infinity", b'{"prompt": "Hi", "temperature": Infinity}'),
    _raw("overflow", b'{"prompt": "Hi", "temperature": 1e999}', "temperature"),
    _raw("long-number", b'{"prompt": "Hi", "seed": ' + b"9" * 5000 + b"}", "seed"),
    _raw("deep", b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    _raw("deep-objects", b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    _raw("nested", b'{"prompt": ' + b"[" * 500 + b"]" * 500 + b"}", "prompt"),
    _raw("control-character", b'{"prompt": "a\x01b"}'),
    _raw("surrogate", rb'{"prompt": "a\ud800"}', "prompt"),
    _raw("surrogate-in-list", rb'{"prompt": ["a", "\udfff"]}', "prompt.1"),
    _raw("surrogate-in-stop", rb'{"prompt": "a", "stop": ["\uD83D"]}', "stop.0"),
    _raw("surrogate-in-key", rb'{"prompt": "a", "\ud800": 1}', r"\ud800"),
    _raw("surrogate-in-message", rb'{"messages": [{"role": "user", "content": "\udc00"}]}', "messages.0.content", CHAT),
    _raw("surrogate-in-tokenize", rb'{"prompt": "\ud800x"}', "prompt", TOKENIZE),
    _raw("no-prompt", b"{}", "prompt"),
    _raw("null-prompt", b'{"prompt": null}', "prompt"),
    _raw("no-messages", b"{}", "messages", CHAT),
    _raw("prompt-for-chat", b'{"prompt": "Hi"}', "prompt", CHAT),
]

PROMPTS: list[Row] = [
    _completion("prompt-number", "prompt", prompt=1),
    _completion("prompt-object", "prompt", prompt={"text": "Hi"}),
    _completion("prompt-empty", "prompt", prompt=""),
    _completion("prompt-empty-list", "prompt", prompt=[]),
    _completion("prompt-empty-ids", "prompt", prompt=[[]]),
    _completion("prompt-mixed", "prompt", prompt=["Hi", 1]),
    _completion("prompt-mixed-lists", "prompt", prompt=[[1], "Hi"]),
    _completion("prompt-bools", "prompt", prompt=[True]),
    _completion("prompt-floats", "prompt", prompt=[1.0]),
    _completion("prompt-negative-id", "prompt", prompt=[1, -1]),
    _completion("prompt-id-outside", "prompt", prompt=[1, HUGE]),
    _completion("prompt-id-outside-second", "prompt", prompt=[[1], [2, HUGE]]),
    _completion("prompt-id-beyond-int64", "prompt", prompt=[2**70]),
    _completion("prompts-too-many", "prompt", prompt=["Hi"] * 1000),
    _completion("prompt-too-long", "prompt", prompt=[1] * 200_000),
    _message("none", "messages"),
    _message("text", "messages.0", "Hi"),
    _message("no-role", "messages.0.role", {"content": "Hi"}),
    _message("no-content", "messages.0.content", {"role": "user"}),
    _message("null-content", "messages.0.content", {"role": "user", "content": None}),
    _message("bad-role", "messages.1.role", HI[0], {"role": "robot", "content": "Hi"}),
    _message("tool-without-call", "messages.1.tool_call_id", HI[0], {"role": "tool", "content": "Hi"}),
    _message("number-content", "messages.0.content", {"role": "user", "content": 7}),
    _message("object-content", "messages.0.content", {"role": "user", "content": {"text": "Hi"}}),
    _message("image", "messages.0.content", _content({"type": "image_url", "image_url": {"url": "x"}})),
    _message("part-without-type", "messages.0.content", _content({"text": "Hi"})),
    _message("part-without-text", "messages.0.content", _content({"type": "text"})),
    _message("part-string", "messages.0.content", _content("Hi")),
    _message("unknown-key", "messages.0.contents", {"role": "user", "content": "Hi", "contents": "x"}),
    _message("tool-calls", "messages.0.tool_calls", {"role": "assistant", "content": "Hi", "tool_calls": [{}]}),
    _chat("messages-object", "messages", messages=HI[0]),
    _chat("messages-string", "messages", messages="Hi"),
    _chat("too-long", "messages", messages=[{"role": "user", "content": "Hi there. " * 20_000}]),
    _chat("continue-and-prompt", "continue_final_message", continue_final_message=True),
]

FIELDS: list[Row] = [
    _completion("model", model=1),
    _completion("tempratur", tempratur=1),
    _completion("unknown-null", "tempratur", tempratur=None),
    _completion("messages", messages=HI),
    _completion("temperature", temperature="hot"),
    _completion("temperature-bool", "temperature", temperature=True),
    _completion("temperature-negative", "temperature", temperature=-0.1),
    _completion("temperature-huge", "temperature", temperature=1e300),
    _completion("temperature-huge-int", "temperature", temperature=10**400),
    _completion("top_p", top_p=0),
    _completion("top_p-above", "top_p", top_p=1.01),
    _completion("top_k", top_k=-2),
    _completion("top_k-float", "top_k", top_k=1.5),
    _completion("min_p", min_p=1.5),
    _completion("max_tokens", max_tokens="10"),
    _completion("max_tokens-bool", "max_tokens", max_tokens=True),
    _completion("max_tokens-negative", "max_tokens", max_tokens=-1),
    _completion("max_tokens-huge", "max_tokens", max_tokens=HUGE),
    _completion("max_completion_tokens", max_completion_tokens=5),
    _completion("min_tokens", min_tokens=5, max_tokens=4),
    _completion("seed", seed=2**63),
    _completion("seed-float", "seed", seed=1.5),
    _completion("n", n=0),
    _completion("n-huge", "n", n=HUGE),
    _completion("best_of", best_of=5),
    _completion("stop", stop=[""]),
    _completion("stop-empty", "stop", stop=""),
    _completion("stop-number", "stop", stop=1),
    _completion("stop-mixed", "stop", stop=["a", 1]),
    _completion("stop-many", "stop", stop=[str(n) for n in range(500)]),
    _completion("stop-long", "stop", stop="x" * 100_000),
    _completion("stop_token_ids", stop_token_ids=["1"]),
    _completion("stop_token_ids-outside", "stop_token_ids", stop_token_ids=[HUGE]),
    _completion("stop_token_ids-many", "stop_token_ids", stop_token_ids=[1] * 5000),
    _completion("ignore_eos", ignore_eos="yes"),
    _completion("presence_penalty", presence_penalty=3),
    _completion("frequency_penalty", frequency_penalty=-2.5),
    _completion("repetition_penalty", repetition_penalty=0),
    _completion("logit_bias", logit_bias=[1]),
    _completion("logit_bias-key", "logit_bias", logit_bias={"the": 1}),
    _completion("logit_bias-value", "logit_bias", logit_bias={"1": 101}),
    _completion("logit_bias-bool", "logit_bias", logit_bias={"1": True}),
    _completion("logit_bias-outside", "logit_bias", logit_bias={str(HUGE): 1}),
    _completion("logit_bias-long-key", "logit_bias", logit_bias={"9" * 5000: 1}),
    _completion("logprobs", logprobs=True),
    _completion("logprobs-many", "logprobs", logprobs=5000),
    _completion("prompt_logprobs", prompt_logprobs=-1),
    _completion("prompt_logprobs-many", "prompt_logprobs", prompt_logprobs=5000),
    _completion("prompt_logprobs-stream", "prompt_logprobs", prompt_logprobs=1, stream=True),
    _completion("echo", echo=1),
    _completion("suffix", suffix="the end"),
    _completion("stream", stream="true"),
    _completion("stream_options", stream_options={"include_usage": True}),
    _completion("stream_options-type", "stream_options", stream=True, stream_options=True),
    _completion("stream_options-key", "stream_options.usage", stream=True, stream_options={"usage": True}),
    _completion(
        "stream_options-value", "stream_options.include_usage", stream=True, stream_options={"include_usage": 1}
    ),
    _completion("return_token_ids", return_token_ids=1),
    _completion("user", user=7),
    _completion("guided_json", guided_json={}),
    _chat("max_tokens", max_tokens=0),
    _chat("max_completion_tokens", max_completion_tokens=HUGE),
    _chat("two-maxima", "max_tokens", max_tokens=5, max_completion_tokens=6),
    _chat("logprobs", logprobs=1),
    _chat("top_logprobs", top_logprobs=2),
    _chat("top_logprobs-many", "top_logprobs", logprobs=True, top_logprobs=5000),
    _chat("echo", echo=True),
    _chat("best_of", best_of=2),
    _chat("tools", tools=[{"type": "function", "function": {"name": ""}}]),
    _chat("tool_choice", tool_choice="required"),
    _chat("functions", functions=[{"name": "f"}]),
    _chat("response_format", response_format={"type": "xml"}),
    _chat("modalities", modalities=["text", "audio"]),
    _chat("audio", audio={"voice": "alloy", "format": "wav"}),
    _chat("reasoning_effort", reasoning_effort="high"),
    _chat("store", store=True),
    _chat("metadata", metadata={"a": "b"}),
    _chat("chat_template", chat_template="{{ 1 }}"),
]

TOKENS: list[Row] = [
    _raw("tokenize-nothing", b"{}", "prompt", TOKENIZE),
    _raw("tokenize-both", json.dumps({"prompt": "Hi", "messages": HI}).encode(), "messages", TOKENIZE),
    _raw("tokenize-list", b'{"prompt": ["Hi"]}', "prompt", TOKENIZE),
    _raw("tokenize-unknown", b'{"promt": "Hi"}', "promt", TOKENIZE),
    _raw("tokenize-role", b'{"messages": [{"role": "x", "content": "Hi"}]}', "messages.0.role", TOKENIZE),
    _raw("detokenize-nothing", b"{}", "tokens", DETOKENIZE),
    _raw("detokenize-text", b'{"tokens": "Hi"}', "tokens", DETOKENIZE),
    _raw("detokenize-negative", b'{"tokens": [-1]}', "tokens", DETOKENIZE),
    _raw("detokenize-bool", b'{"tokens": [true]}', "tokens", DETOKENIZE),
    _raw("detokenize-outside", b'{"tokens": [1000000000]}', "tokens", DETOKENIZE),
]

MALFORMED: list[Row] = BODIES + PROMPTS + FIELDS + TOKENS
