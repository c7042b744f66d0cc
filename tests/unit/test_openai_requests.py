"""What the API accepts and refuses, and what the engine is asked to do for it."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import ClusterConfig
from cluster.messages.requests import SamplingParams
from deploy.ingress.openai import errors
from deploy.ingress.openai.errors import APIError
from deploy.ingress.openai.parsing import parse_body
from deploy.ingress.openai.requests import ChatCompletionRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from deploy.ingress.openai.sampling import check_limits, check_token_ids, to_sampling_params
from tests.malformed import CHAT, COMPLETIONS, DETOKENIZE, MALFORMED, TOKENIZE

MODELS = {
    COMPLETIONS: CompletionRequest,
    CHAT: ChatCompletionRequest,
    TOKENIZE: TokenizeRequest,
    DETOKENIZE: DetokenizeRequest,
}
HI = [{"role": "user", "content": "Hi"}]
EOS = 0


def body(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields).encode()


def completion(**fields: Any) -> CompletionRequest:
    return parse_body(body({"prompt": "Hi"} | fields), CompletionRequest)


def chat(**fields: Any) -> ChatCompletionRequest:
    return parse_body(body({"messages": HI} | fields), ChatCompletionRequest)


def params(request: CompletionRequest | ChatCompletionRequest, **given: Any) -> SamplingParams:
    known: dict[str, Any] = {
        "max_model_len": 100,
        "prompt_len": 10,
        "eos_token_ids": (EOS,),
        "vocab_size": 300,
    }
    check_limits(request, given.pop("limits", ClusterConfig(model="demo")), 300)
    return to_sampling_params(request, **known | given)


def serve(endpoint: str, raw: bytes) -> None:
    """As the routes do, with one token per character of a prompt."""
    request = parse_body(raw, MODELS[endpoint])
    if isinstance(request, CompletionRequest):
        for prompt in request.prompt:
            params(request, prompt_len=len(prompt))
    elif isinstance(request, ChatCompletionRequest):
        params(request, prompt_len=sum(len(message.content) for message in request.messages))
    elif isinstance(request, DetokenizeRequest):
        check_token_ids(request.tokens, 300, "tokens")


class TestRefused:
    @pytest.mark.parametrize(
        ("endpoint", "raw", "status", "param"), [row[1:] for row in MALFORMED], ids=[r[0] for r in MALFORMED]
    )
    def test_names_the_field(self, endpoint: str, raw: bytes, status: int, param: str | None) -> None:
        with pytest.raises(APIError) as caught:
            serve(endpoint, raw)
        error = caught.value
        assert (error.status, error.param) == (status, param)
        assert error.code
        assert error.type == "invalid_request_error"
        if param is not None:
            assert param.split(".")[-1] in error.message or param in error.message
        assert len(error.message) < 600, "an error must not send the body back"
        json.dumps(error.body(), ensure_ascii=False).encode()

    def test_the_table_is_large_and_its_ids_are_unique(self) -> None:
        assert len({row[0] for row in MALFORMED}) == len(MALFORMED) >= 70

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"tempratur": 1}, "unknown field 'tempratur': did you mean 'temperature'?"),
            ({"xyzzy": 1}, "unknown field 'xyzzy'"),
            ({"temperature": "hot"}, "temperature='hot': Input should be a valid number"),
            ({"suffix": "end"}, "suffix is not supported"),
            (
                {"prompt": 7},
                "prompt=7: must be a string, a list of strings, a list of token ids or a list of lists of token ids",
            ),
            ({"logit_bias": {"a": 1}}, "logit_bias={'a': 1}: key 'a' is not a token id"),
        ],
    )
    def test_messages_are_for_people(self, fields: dict[str, Any], message: str) -> None:
        with pytest.raises(APIError) as caught:
            completion(**fields)
        assert caught.value.message == message

    def test_an_unknown_field_is_reported_before_the_field_that_it_was_meant_to_be(self) -> None:
        with pytest.raises(APIError) as caught:
            parse_body(b'{"promt": "x"}', CompletionRequest)
        assert (caught.value.param, caught.value.code) == ("promt", "unknown_parameter")

    @given(raw=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
    def test_any_bytes_are_refused_or_understood(self, raw: bytes) -> None:
        for model in MODELS.values():
            with pytest.raises(APIError):
                parse_body(raw, model)

    @given(
        value=st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
            max_leaves=6,
        ),
        name=st.sampled_from(sorted(CompletionRequest.model_fields)),
    )
    def test_any_value_of_a_field_is_refused_or_understood(self, value: Any, name: str) -> None:
        raw = body({"prompt": "Hi"} | {name: value})
        with contextlib.suppress(APIError):
            serve(COMPLETIONS, raw)


class TestAccepted:
    @pytest.mark.parametrize(
        "fields",
        [
            {},
            {"model": "demo", "user": "me", "temperature": 0, "top_p": 1, "top_k": -1, "seed": -(2**63)},
            {"prompt": ["a", "b"], "n": 2, "stop": "x", "logprobs": 0, "echo": True, "max_tokens": 0},
            {"stream": True, "stream_options": {"include_usage": True}},
            {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
            {"suffix": "", "best_of": 1, "response_format": {"type": "text"}, "store": False},
            {"n": 3, "best_of": 3},
            {"temperature": None, "stop": None, "logit_bias": None, "suffix": None, "stream_options": None},
            {"logit_bias": {"5": -100, "6": 0.5}, "stop_token_ids": [1, 1], "min_tokens": 3},
            {"return_token_ids": True, "return_routed_experts": True, "prompt_logprobs": 2},
        ],
    )
    def test_completions(self, fields: dict[str, Any]) -> None:
        params(completion(**fields))

    @pytest.mark.parametrize(
        "fields",
        [
            {},
            {"max_tokens": 5, "max_completion_tokens": 5},
            {"tools": [], "tool_choice": "none", "parallel_tool_calls": True, "modalities": ["text"], "echo": False},
            {"tools": None, "functions": None, "audio": None, "response_format": None, "reasoning_effort": None},
            {"logprobs": False, "top_logprobs": None},
            {"logprobs": True, "top_logprobs": 20},
            {"add_generation_prompt": False, "continue_final_message": True},
            {"messages": [{"role": "assistant", "content": "x", "refusal": None, "tool_calls": None, "name": None}]},
        ],
    )
    def test_chat(self, fields: dict[str, Any]) -> None:
        params(chat(**fields))

    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            ("Hi", ["Hi"]),
            (["a", "b"], ["a", "b"]),
            ([1, 2], [[1, 2]]),
            ([[1], [2, 3]], [[1], [2, 3]]),
            (["😀"], ["😀"]),
        ],
    )
    def test_a_prompt_becomes_a_list_of_prompts(self, given: Any, expected: Any) -> None:
        assert completion(prompt=given).prompt == expected

    def test_an_escaped_pair_of_surrogates_is_a_character(self) -> None:
        assert parse_body(rb'{"prompt": "\ud83d\ude00"}', CompletionRequest).prompt == ["😀"]

    def test_messages_for_the_template(self) -> None:
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        request = chat(
            messages=[{"role": "developer", "content": "x"}, {"role": "user", "content": parts, "name": "Ada"}]
        )
        assert [message.for_template() for message in request.messages] == [
            {"role": "system", "content": "x"},
            {"role": "user", "content": "a\nb", "name": "Ada"},
        ]

    def test_tokenize_takes_a_prompt_or_messages(self) -> None:
        assert parse_body(b'{"prompt": "x"}', TokenizeRequest).prompt == "x"
        assert parse_body(body({"messages": HI}), TokenizeRequest).messages is not None
        assert parse_body(b'{"tokens": []}', DetokenizeRequest).tokens == []


class TestSamplingParams:
    def test_defaults(self) -> None:
        assert params(completion(seed=7)) == SamplingParams(
            max_tokens=16, temperature=1.0, seed=params(completion(seed=7)).seed, stop_token_ids=(EOS,)
        )

    def test_every_field_arrives(self) -> None:
        request = completion(
            max_tokens=5, temperature=0.5, top_p=0.9, top_k=40, min_p=0.1, min_tokens=2, stop_token_ids=[7, EOS, 7],
            presence_penalty=1, frequency_penalty=-1, repetition_penalty=1.2, logit_bias={"5": -100}, logprobs=3,
            prompt_logprobs=1, return_routed_experts=True, seed=1,
        )  # fmt: skip
        found = params(request)
        assert found == SamplingParams(
            max_tokens=5, temperature=0.5, top_p=0.9, top_k=40, min_p=0.1, seed=found.seed, min_tokens=2,
            stop_token_ids=(EOS, 7), presence_penalty=1.0, frequency_penalty=-1.0, repetition_penalty=1.2,
            logit_bias=((5, -100.0),), logprobs=3, prompt_logprobs=1, return_routed_experts=True,
        )  # fmt: skip

    @pytest.mark.parametrize(
        ("request_", "prompt_len", "expected"),
        [
            (completion(), 10, 16),
            (completion(), 95, 5),
            (completion(max_tokens=90), 10, 90),
            (completion(max_tokens=0), 100, 0),
            (chat(), 10, 90),
            (chat(), 99, 1),
            (chat(max_tokens=3), 10, 3),
            (chat(max_completion_tokens=4), 10, 4),
        ],
    )
    def test_max_tokens(self, request_: Any, prompt_len: int, expected: int) -> None:
        assert params(request_, prompt_len=prompt_len).max_tokens == expected

    @pytest.mark.parametrize(
        ("request_", "prompt_len", "param"),
        [
            (completion(), 100, "prompt"),
            (completion(max_tokens=0), 101, "prompt"),
            (completion(max_tokens=91), 10, "max_tokens"),
            (completion(max_tokens=5), 100, "prompt"),
            (chat(), 100, "messages"),
            (chat(max_tokens=91), 10, "max_tokens"),
            (chat(max_completion_tokens=91), 10, "max_completion_tokens"),
        ],
    )
    def test_what_exceeds_the_context_is_refused(self, request_: Any, prompt_len: int, param: str) -> None:
        with pytest.raises(APIError, match="maximum context length is 100 tokens") as caught:
            params(request_, prompt_len=prompt_len)
        assert (caught.value.param, caught.value.code) == (param, "context_length_exceeded")

    def test_ignore_eos_leaves_only_the_requests_own_ids(self) -> None:
        assert params(completion(ignore_eos=True)).stop_token_ids == ()
        assert params(completion(ignore_eos=True, stop_token_ids=[9])).stop_token_ids == (9,)

    @pytest.mark.parametrize(("top_k", "expected"), [(-1, 0), (0, 0), (1, 1), (299, 299), (300, 0), (10**9, 0)])
    def test_top_k_that_excludes_nothing_is_off(self, top_k: int, expected: int) -> None:
        assert params(completion(top_k=top_k)).top_k == expected

    @pytest.mark.parametrize(("temperature", "expected"), [(0, 0.0), (1e-9, 0.0), (0.01, 0.01), (2, 2.0)])
    def test_a_tiny_temperature_is_greedy(self, temperature: float, expected: float) -> None:
        assert params(completion(temperature=temperature)).temperature == expected

    def test_seeds(self) -> None:
        seeds = [params(completion(seed=seed), choice_index=n).seed for seed in (1, 2, -1) for n in range(4)]
        assert len(set(seeds)) == 12
        assert seeds == [params(completion(seed=seed), choice_index=n).seed for seed in (1, 2, -1) for n in range(4)]
        assert all(0 <= seed < 2**63 for seed in seeds)
        assert params(completion()).seed != params(completion()).seed, "without a seed every request is random"

    @pytest.mark.parametrize(
        ("request_", "logprobs", "prompt_logprobs"),
        [
            (completion(), None, None),
            (completion(logprobs=0), 0, None),
            (completion(logprobs=2, echo=True), 2, 2),
            (completion(echo=True), None, None),
            (completion(logprobs=1, prompt_logprobs=3, echo=True), 1, 3),
            (completion(prompt_logprobs=0), None, 0),
            (chat(), None, None),
            (chat(logprobs=True), 0, None),
            (chat(logprobs=True, top_logprobs=4, prompt_logprobs=1), 4, 1),
        ],
    )
    def test_logprobs(self, request_: Any, logprobs: int | None, prompt_logprobs: int | None) -> None:
        found = params(request_)
        assert (found.logprobs, found.prompt_logprobs) == (logprobs, prompt_logprobs)

    def test_limits_are_the_servers(self) -> None:
        limits = ClusterConfig(model="demo", max_choices=2, max_stop=1, max_logprobs=0)
        for request, param in [
            (completion(prompt=["a", "b", "c"]), "prompt"),
            (completion(prompt=["a", "b"], n=2), "n"),
            (completion(stop=["a", "b"]), "stop"),
            (completion(logprobs=1), "logprobs"),
            (chat(logprobs=True, top_logprobs=1), "top_logprobs"),
            (chat(prompt_logprobs=1), "prompt_logprobs"),
        ]:
            with pytest.raises(APIError) as caught:
                params(request, limits=limits)
            assert caught.value.param == param


@pytest.mark.parametrize(
    ("error", "status", "type_", "code"),
    [
        (errors.invalid_request("no", "n"), 400, "invalid_request_error", "invalid_value"),
        (errors.model_not_found("x", "demo"), 404, "invalid_request_error", "model_not_found"),
        (errors.route_not_found("GET", "/x"), 404, "invalid_request_error", "unknown_url"),
        (errors.method_not_allowed("GET", "/x", ["POST"]), 405, "invalid_request_error", "method_not_allowed"),
        (errors.unauthorized(), 401, "invalid_request_error", "invalid_api_key"),
        (errors.too_large(8), 413, "invalid_request_error", "request_too_large"),
        (errors.overloaded(3), 429, "overloaded_error", "rate_limit_exceeded"),
        (errors.unavailable("loading"), 503, "unavailable_error", "unavailable"),
        (errors.internal("r-1"), 500, "server_error", "internal_error"),
    ],
)
def test_errors_have_openais_shape(error: APIError, status: int, type_: str, code: str) -> None:
    assert error.status == status
    assert error.body() == {"error": {"message": error.message, "type": type_, "param": error.param, "code": code}}
    assert ("Retry-After" in error.headers) == (status in (429, 503))
