"""Answers in OpenAI's shapes: the official client's models read them, whole and streamed alike."""

import base64
import io
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from cluster.messages.requests import RequestOutput, RoutedExperts, TokenLogprob
from deploy.ingress.openai.answer_json import dump
from deploy.ingress.openai.choices import Choice, ChoiceDelta, merge, spell_prompt
from deploy.ingress.openai.parsing import parse_body
from deploy.ingress.openai.requests import ChatCompletionRequest, CompletionRequest
from deploy.ingress.openai.responses import ChatResponder, CompletionResponder, Usage, sse
from deploy.ingress.openai.sampling import to_sampling_params
from deploy.ingress.text.tokens import Tokenizer
from tests import tiny_tokenizers

TOKENIZER = Tokenizer(tiny_tokenizers.byte_level())
EOS = 0
PROMPT_TEXT = "Hello, dog"
PROMPT = TOKENIZER.encode(PROMPT_TEXT)
HI = [{"role": "user", "content": "Hi"}]
ROUTED = RoutedExperts((4, 2, 3), "uint8", bytes(range(24)))

Request = CompletionRequest | ChatCompletionRequest


def completion(**fields: Any) -> CompletionRequest:
    return parse_body(json.dumps({"prompt": PROMPT_TEXT} | fields).encode(), CompletionRequest)


def chat(**fields: Any) -> ChatCompletionRequest:
    return parse_body(json.dumps({"messages": HI} | fields).encode(), ChatCompletionRequest)


def choice_of(request: Request, prompt: Sequence[int] = PROMPT, index: int = 0) -> Choice:
    params = to_sampling_params(
        request, max_model_len=500, prompt_len=len(prompt), eos_token_ids=(EOS,), vocab_size=TOKENIZER.vocab_size
    )
    echoed = spell_prompt(prompt, TOKENIZER) if request.is_echo else ()
    return Choice(index, request, params, prompt, TOKENIZER, (EOS,), echoed)


def scored(token_id: int, num_top: int = 2) -> TokenLogprob:
    """Less likely than the tokens beside it, so that `top` doesn't hold it."""
    return TokenLogprob(token_id, -3.0, 7, tuple((token_id + n, -0.5 * n) for n in range(1, num_top + 1)))


def outputs(text: str, finish: Any = "length", step: int = 1, **last: Any) -> list[RequestOutput]:
    """As an engine reports them: `step` tokens at a time, then the end."""
    ids = tuple(TOKENIZER.encode(text)) + ((EOS,) if finish == "stop" else ())
    parts = [ids[n : n + step] for n in range(0, len(ids), step)] or [()]
    found = [RequestOutput("r", part, tuple(map(scored, part))) for part in parts[:-1]]
    return [*found, RequestOutput("r", parts[-1], tuple(map(scored, parts[-1])), finish_reason=finish, **last)]


def run(
    request: Request, found: list[RequestOutput], prompt: Sequence[int] = PROMPT
) -> tuple[Choice, list[ChoiceDelta]]:
    choice = choice_of(request, prompt)
    return choice, [choice.feed(output) for output in found]


class TestChoice:
    @given(text=st.text("ab €\n", max_size=20), step=st.integers(1, 4), stop=st.sampled_from(["", "b", " a", "€\n"]))
    def test_streaming_in_any_steps_gives_the_same_answer(self, text: str, step: int, stop: str) -> None:
        request = completion(max_tokens=100, stop=[stop] if stop else [])
        whole = merge(run(request, outputs(text, "stop", step=100))[1])
        streamed = merge(run(request, outputs(text, "stop", step=step))[1])
        assert (streamed.text, streamed.finish_reason, streamed.stop_reason) == (whole.text, "stop", whole.stop_reason)
        assert whole.text == (text.split(stop)[0] if stop else text)

    def test_end_of_sequence_has_no_text_and_no_stop_reason(self) -> None:
        choice, deltas = run(completion(skip_special_tokens=False), outputs("ab", "stop"))
        assert (merge(deltas).text, choice.finish_reason, choice.stop_reason) == ("ab", "stop", None)
        assert choice.num_tokens == len(TOKENIZER.encode("ab")) + 1, "it was generated all the same"

    def test_a_stop_token_of_the_request_is_the_reason(self) -> None:
        (stop,) = TOKENIZER.encode("!")
        choice, deltas = run(completion(stop_token_ids=[stop]), [RequestOutput("r", (stop,), finish_reason="stop")])
        assert (merge(deltas).text, choice.stop_reason) == ("", stop)
        request = completion(stop_token_ids=[stop], include_stop_str_in_output=True)
        assert merge(run(request, [RequestOutput("r", (stop,), finish_reason="stop")])[1]).text == "!"

    def test_a_stop_string_ends_the_choice_before_the_front_knows(self) -> None:
        choice, deltas = run(completion(stop="ll", return_token_ids=True), outputs("a hello world"))
        assert (merge(deltas).text, choice.finish_reason, choice.stop_reason) == ("a he", "stop", "ll")
        assert choice.must_abort
        assert choice.num_tokens == len(merge(deltas).token_ids) < len(TOKENIZER.encode("a hello world"))
        assert deltas[-1].is_empty, "what comes after the end is ignored"

    def test_no_abort_when_the_front_ended_it_too(self) -> None:
        choice, _ = run(completion(stop="b"), outputs("ab", step=9))
        assert (choice.stop_reason, choice.must_abort) == ("b", False)

    def test_stop_strings_wait_for_min_tokens(self) -> None:
        assert merge(run(completion(stop="x", min_tokens=2, max_tokens=5), outputs("xyxyx"))[1]).text == "xy"

    def test_held_text_comes_out_at_the_end(self) -> None:
        _, deltas = run(completion(stop="abc!"), outputs("ab"))
        assert [delta.text for delta in deltas] == ["", "ab"]
        assert not deltas[0].is_empty, "the first delta opens the choice"

    def test_an_unfinished_character_comes_out_at_the_end(self) -> None:
        ids = TOKENIZER.encode("€")[:-1]
        _, deltas = run(completion(), [RequestOutput("r", tuple(ids), finish_reason="length")])
        assert merge(deltas).text == "\ufffd"

    def test_echo_puts_the_prompt_before_the_text(self) -> None:
        prompt = TOKENIZER.encode("<|start_of_role|>a€")
        request = completion(echo=True)
        assert merge(run(request, outputs(" b"), prompt)[1]).text == "<|start_of_role|>a€ b"
        split = merge(run(request, [RequestOutput("r", tuple(prompt[-1:]), finish_reason="length")], prompt[:-1])[1])
        assert split.text == "<|start_of_role|>a€", "a character that the prompt begins is written once"

    def test_alternatives_count_in_its_size(self) -> None:
        """What is long is written in a thread: see Service.run."""
        scores = (None, *(scored(token, 20) for token in PROMPT[1:]))
        request = completion(prompt_logprobs=20, echo=True, logprobs=20, max_tokens=1)
        output = RequestOutput("r", (5,), (scored(5, 20),), prompt_logprobs=scores, finish_reason="length")
        [delta] = run(request, [output])[1]
        assert delta.size > 10 * 21 * 2 * len(PROMPT)
        [plain] = run(completion(max_tokens=1), [RequestOutput("r", (5,), finish_reason="length")])[1]
        assert plain.size == len(plain.text) + len(PROMPT)

    def test_scoring_a_prompt_without_generating(self) -> None:
        scores = (None, *map(scored, PROMPT[1:]))
        request = completion(echo=True, logprobs=1, max_tokens=0)
        delta = merge(run(request, [RequestOutput("r", prompt_logprobs=scores, finish_reason="length")])[1])
        assert (delta.text, delta.finish_reason) == (PROMPT_TEXT, "length")
        assert [row.token_id for row in delta.rows] == PROMPT


def completion_answer(request: CompletionRequest, found: list[RequestOutput]) -> dict[str, Any]:
    choice, deltas = run(request, found)
    answer = CompletionResponder(request, TOKENIZER, "demo").response([deltas], Usage.of([choice], request.n))
    return json.loads(sse(answer).removeprefix(b"data: "))


def chat_answer(request: ChatCompletionRequest, found: list[RequestOutput]) -> dict[str, Any]:
    choice, deltas = run(request, found)
    answer = ChatResponder(request, TOKENIZER, "demo").response([deltas], Usage.of([choice], request.n))
    return json.loads(sse(answer).removeprefix(b"data: "))


class TestCompletion:
    def test_the_official_client_reads_it(self) -> None:
        answer = completion_answer(completion(logprobs=2), outputs("one 😀", "stop"))
        read = Completion.model_validate_json(json.dumps(answer), strict=True)
        assert read.object == "text_completion"
        assert read.id.startswith("cmpl-")
        assert (read.choices[0].text, read.choices[0].finish_reason) == ("one 😀", "stop")
        assert read.usage is not None
        assert read.usage.prompt_tokens == len(PROMPT)
        assert read.usage.completion_tokens == len(TOKENIZER.encode("one 😀")) + 1

    def test_only_what_was_asked_for_is_there(self) -> None:
        choice = completion_answer(completion(), outputs("x", routed_experts=ROUTED))["choices"][0]
        assert choice == {"index": 0, "text": "x", "logprobs": None, "finish_reason": "length", "stop_reason": None}

    def test_logprobs_with_echo(self) -> None:
        scores = (None, *map(scored, PROMPT[1:]))
        found = outputs(" world €", prompt_logprobs=None)
        found[0] = RequestOutput("r", found[0].token_ids, found[0].logprobs, prompt_logprobs=scores)
        choice = completion_answer(completion(echo=True, logprobs=1), found)["choices"][0]
        logprobs = choice["logprobs"]
        assert choice["text"] == PROMPT_TEXT + " world €"
        assert len({len(logprobs[key]) for key in logprobs}) == 1
        assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]) == (None, None)
        assert logprobs["token_logprobs"][1:] == [-3.0] * (len(logprobs["tokens"]) - 1)
        whole = "".join(t for t in logprobs["tokens"] if not t.startswith("bytes:"))
        assert whole == PROMPT_TEXT + " world "
        for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
            if not token.startswith("bytes:"):
                assert choice["text"].startswith(token, offset)
            else:
                assert offset == len(PROMPT_TEXT + " world ")

    def test_top_logprobs_hold_the_token_itself(self) -> None:
        (token,) = TOKENIZER.encode("a")
        found = [RequestOutput("r", (token,), (scored(token, 5),), finish_reason="length")]
        for asked, names in [(0, "a"), (2, "bca")]:
            top = completion_answer(completion(logprobs=asked), found)["choices"][0]["logprobs"]["top_logprobs"]
            assert [list(entry) for entry in top] == [list(names)]

    def test_infinite_logprobs_become_a_json_number(self) -> None:
        found = [RequestOutput("r", (5,), (TokenLogprob(5, -math.inf, 9, ((6, -math.inf),)),), finish_reason="length")]
        choice = completion_answer(completion(logprobs=1), found)["choices"][0]
        assert choice["logprobs"]["token_logprobs"] == [-9999.0]

    def test_prompt_logprobs_as_vllm(self) -> None:
        scores = (None, *map(scored, PROMPT[1:]))
        found = [RequestOutput("r", (5,), prompt_logprobs=scores, finish_reason="length")]
        answer = completion_answer(completion(prompt_logprobs=1), found)["choices"][0]["prompt_logprobs"]
        token = PROMPT[1]
        assert len(answer) == len(PROMPT)
        assert answer[0] is None
        assert answer[1] == {
            str(token): {"logprob": -3.0, "rank": 7, "decoded_token": TOKENIZER.token_text(token)},
            str(token + 1): {"logprob": -0.5, "rank": 1, "decoded_token": TOKENIZER.token_text(token + 1)},
        }

    def test_token_ids_and_routed_experts_as_vllm(self) -> None:
        request = completion(return_token_ids=True, return_routed_experts=True)
        choice = completion_answer(request, outputs("hello", routed_experts=ROUTED))["choices"][0]
        assert (choice["prompt_token_ids"], choice["token_ids"]) == (PROMPT, TOKENIZER.encode("hello"))
        array = np.load(io.BytesIO(base64.b64decode(choice["routed_experts"])))
        assert (array.shape, array.dtype) == ((4, 2, 3), np.uint8)
        assert array.tobytes() == ROUTED.data

    @pytest.mark.parametrize("replayed", [False, True])
    def test_routed_experts_come_piece_by_piece_and_survive_a_stop_string(self, replayed: bool) -> None:
        """A sequence that the ingress ends; a front that takes it over starts anew, and may know it all."""
        request = completion(stop=["llo"], return_token_ids=True, return_routed_experts=True)
        rows = np.arange(len(PROMPT) + 9, dtype=np.uint8)[:, None, None].repeat(2, 1)

        def piece(first: int, last: int) -> RoutedExperts:
            return RoutedExperts((last - first, 2, 1), "uint8", rows[first:last].tobytes(), first)

        found, end = [], len(PROMPT)
        for n, output in enumerate(outputs("hello", None)):
            first = 0 if n == 0 or (replayed and n == 2) else end
            end = len(PROMPT) + n
            found.append(replace(output, routed_experts=piece(first, end)))
        choice = completion_answer(request, found)["choices"][0]
        array = np.load(io.BytesIO(base64.b64decode(choice["routed_experts"])))
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "llo")
        assert np.array_equal(array, rows[: len(PROMPT) + len(choice["token_ids"]) - 1])

    def test_stream(self) -> None:
        request = completion(stream=True, stream_options={"include_usage": True}, logprobs=1, return_token_ids=True)
        choice, deltas = run(request, outputs("one two €!", "stop"))
        responder = CompletionResponder(request, TOKENIZER, "demo")
        chunks = [responder.chunk(delta) for delta in deltas] + [responder.usage_chunk(Usage.of([choice], 1))]
        # As the client does: its model declares finish_reason as always there.
        read = [Completion.construct(**json.loads(dump(chunk))) for chunk in chunks]
        assert "".join(c.choices[0].text for c in read[:-1]) == "one two €!"
        assert [c.choices[0].finish_reason for c in read[:-1]] == [None] * (len(read) - 2) + ["stop"]
        assert (read[-1].choices, chunks[0]["usage"]) == ([], None)
        assert read[-1].usage is not None
        assert read[-1].usage.completion_tokens == choice.num_tokens
        assert len({chunk["id"] for chunk in chunks}) == 1
        whole = json.loads(dump(responder.response([deltas], Usage.of([choice], 1))))["choices"][0]
        offsets = [n for chunk in chunks[:-1] for n in chunk["choices"][0]["logprobs"]["text_offset"]]
        assert offsets == whole["logprobs"]["text_offset"]
        assert [n for chunk in chunks[:-1] for n in chunk["choices"][0]["token_ids"]] == list(whole["token_ids"])
        assert ["prompt_token_ids" in chunk["choices"][0] for chunk in chunks[:2]] == [True, False]


class TestChat:
    def test_the_official_client_reads_it(self) -> None:
        request = chat(logprobs=True, top_logprobs=1)
        read = ChatCompletion.model_validate_json(json.dumps(chat_answer(request, outputs("Hi €", "stop"))))
        assert read.object == "chat.completion"
        assert read.id.startswith("chatcmpl-")
        message = read.choices[0].message
        assert (message.role, message.content, read.choices[0].finish_reason) == ("assistant", "Hi €", "stop")
        assert read.usage is not None
        assert read.usage.total_tokens == read.usage.prompt_tokens + read.usage.completion_tokens
        logprobs = read.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.content is not None
        spelled = [byte for entry in logprobs.content[:-1] for byte in entry.bytes or []]
        assert bytes(spelled).decode() == "Hi €"
        assert all(len(entry.top_logprobs) == 1 for entry in logprobs.content)

    def test_only_what_was_asked_for_is_there(self) -> None:
        answer = chat_answer(chat(), outputs("x", routed_experts=ROUTED))
        assert set(answer) == {"id", "object", "created", "model", "choices", "usage"}
        assert set(answer["choices"][0]) == {"index", "message", "logprobs", "finish_reason", "stop_reason"}

    def test_what_concerns_the_prompt_stands_beside_the_choices(self) -> None:
        scores = (None, *map(scored, PROMPT[1:]))
        found = [RequestOutput("r", (5,), prompt_logprobs=scores, finish_reason="length")]
        answer = chat_answer(chat(prompt_logprobs=0, return_token_ids=True), found)
        assert answer["prompt_token_ids"] == PROMPT
        assert [len(entry or "") for entry in answer["prompt_logprobs"]] == [0] + [1] * (len(PROMPT) - 1)
        assert answer["choices"][0]["token_ids"] == [5]

    def test_stream(self) -> None:
        request = chat(stream=True, stream_options={"include_usage": True}, logprobs=True, top_logprobs=2)
        choice, deltas = run(request, outputs("Hi there €", "stop"))
        responder = ChatResponder(request, TOKENIZER, "demo")
        chunks = [responder.chunk(delta) for delta in deltas] + [responder.usage_chunk(Usage.of([choice], 1))]
        read = [ChatCompletionChunk.model_validate_json(dump(chunk)) for chunk in chunks]
        assert [c.choices[0].delta.role for c in read[:-1]] == ["assistant"] + [None] * (len(read) - 2)
        assert "".join(c.choices[0].delta.content or "" for c in read[:-1]) == "Hi there €"
        assert [c.choices[0].finish_reason for c in read[:-1]] == [None] * (len(read) - 2) + ["stop"]
        assert read[-1].choices == []
        assert read[-1].usage is not None
        assert chunks[0]["usage"] is None

    def test_without_include_usage_a_chunk_has_no_usage(self) -> None:
        request = chat(stream=True)
        _, deltas = run(request, outputs("x"))
        assert "usage" not in ChatResponder(request, TOKENIZER, "demo").chunk(deltas[0])


def test_usage_counts_each_prompt_once() -> None:
    request = completion(prompt=["Hello", "b"], n=2)
    prompts = [TOKENIZER.encode(prompt) for prompt in request.prompt if isinstance(prompt, str)]
    choices = [choice_of(request, prompts[index // 2], index) for index in range(4)]
    for choice in choices:
        choice.feed(RequestOutput("r", (5, 6), finish_reason="length", num_cached_tokens=1))
    usage = Usage.of(choices, 2)
    assert usage == Usage(len(prompts[0]) + len(prompts[1]), 8, 2)
    assert usage.as_json()["prompt_tokens_details"] == {"cached_tokens": 2}


def test_an_event_is_one_line_of_utf8() -> None:
    assert sse({"text": "a\nb \u2028 €"}) == 'data: {"text":"a\\nb \u2028 €"}\n\n'.encode()
    with pytest.raises(ValueError, match="not JSON compliant"):
        sse({"logprob": math.nan})
