"""Every request field that the official client's create() methods know: it has its effect, or it is refused by name.

Effects are compared with the oracle, which applies each rule to transformers' logits in its plainest form.
"""

import inspect
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.e2e.oracle import Oracle, Rule, bias, count, repeat
from tests.e2e.servers import MODEL

PROMPT = "Experts are stateless services."
EOS = 0
NUM_TOKENS = 20

# Parameters of create() that travel in the URL or header, or are tested in test_openai_client.py, _logprobs.py and
# _tools.py.
ELSEWHERE = {
    "self", "extra_headers", "extra_query", "extra_body", "timeout", "model", "prompt", "messages", "stream",
    "stream_options", "user", "n", "max_tokens", "max_completion_tokens", "echo", "logprobs", "top_logprobs",
    "response_format", "tools", "tool_choice",
}  # fmt: skip
EFFECTS = {"temperature", "top_p", "seed", "stop", "presence_penalty", "frequency_penalty", "logit_bias", "best_of"}
REFUSED_COMPLETION: dict[str, Any] = {"suffix": "the end", "best_of": 2}
REFUSED_CHAT: dict[str, Any] = {
    "audio": {"voice": "alloy", "format": "wav"},
    "function_call": {"name": "f"},
    "functions": [{"name": "f"}],
    "metadata": {"a": "b"},
    "modalities": ["text", "audio"],
    "moderation": {"model": "m"},
    "prediction": {"type": "content", "content": "Hi"},
    "prompt_cache_key": "k",
    "prompt_cache_options": {"a": 1},
    "prompt_cache_retention": "24h",
    "reasoning_effort": "high",
    "safety_identifier": "s",
    "service_tier": "flex",
    "store": True,
    "verbosity": "low",
    "web_search_options": {},
}
# Accepted whatever the value: without tools it asks for nothing.
NO_EFFECT = {"parallel_tool_calls"}


def tokens(
    client: OpenAI, num_tokens: int = NUM_TOKENS, extra: dict[str, Any] | None = None, **fields: Any
) -> list[int]:
    """The tokens of one completion; greedy unless `fields` say otherwise."""
    body = {"return_token_ids": True, "ignore_eos": True} | (extra or {})
    settings: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "temperature": 0, "max_tokens": num_tokens} | fields
    answer = client.completions.create(**settings, extra_body=body)
    return (answer.choices[0].model_extra or {})["token_ids"]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def prompt_ids(oracle: Oracle) -> list[int]:
    return oracle.encode(PROMPT)


@pytest.fixture(scope="module")
def greedy(oracle: Oracle, prompt_ids: list[int]) -> list[int]:
    return oracle.greedy(prompt_ids, NUM_TOKENS)


@pytest.fixture(scope="module")
def text(oracle: Oracle, greedy: list[int]) -> str:
    return oracle.decode(greedy)


def test_every_parameter_of_the_client_is_known_here(client: OpenAI) -> None:
    known = ELSEWHERE | EFFECTS | NO_EFFECT
    completion = set(inspect.signature(type(client.completions).create).parameters)
    chat = set(inspect.signature(type(client.chat.completions).create).parameters)
    assert completion - known - REFUSED_COMPLETION.keys() == set()
    assert chat - known - REFUSED_CHAT.keys() == set()


@pytest.mark.parametrize("field", REFUSED_COMPLETION)
def test_completions_refuse_by_name(client: OpenAI, field: str) -> None:
    with pytest.raises(openai.BadRequestError, match=field) as caught:
        client.completions.create(model=MODEL, prompt="Hi", **{field: REFUSED_COMPLETION[field]})
    assert (caught.value.param, caught.value.code) == (field, "unsupported_parameter")


@pytest.mark.parametrize("field", REFUSED_CHAT)
def test_chat_refuses_by_name(client: OpenAI, field: str) -> None:
    messages: Any = [{"role": "user", "content": "Hi"}]
    with pytest.raises(openai.BadRequestError, match=field) as caught:
        client.chat.completions.create(model=MODEL, messages=messages, **{field: REFUSED_CHAT[field]})
    assert (caught.value.param, caught.value.code) == (field, "unsupported_parameter")


class TestPenaltiesAndBias:
    @pytest.mark.parametrize(
        ("fields", "extra", "rule"),
        [
            ({"frequency_penalty": 2.0}, {}, count(2.0, 0)),
            ({"frequency_penalty": -2.0}, {}, count(-2.0, 0)),
            ({"presence_penalty": 2.0}, {}, count(0, 2.0)),
            ({"presence_penalty": -2.0, "frequency_penalty": 0.5}, {}, count(0.5, -2.0)),
            ({}, {"repetition_penalty": 1.7}, repeat(1.7)),
            ({}, {"repetition_penalty": 0.4}, repeat(0.4)),
        ],
        ids=["frequency", "frequency-below-0", "presence", "both", "repetition", "repetition-below-1"],
    )
    def test_penalties_change_the_logits_as_published(
        self,
        client: OpenAI,
        oracle: Oracle,
        prompt_ids: list[int],
        greedy: list[int],
        fields: dict[str, float],
        extra: dict[str, float],
        rule: Rule,
    ) -> None:
        expected = oracle.greedy_with(prompt_ids, NUM_TOKENS, rule)
        assert expected != greedy, "a test without an effect proves nothing"
        assert tokens(client, extra=extra, **fields) == expected

    def test_a_large_bias_forces_or_bans_a_token(self, client: OpenAI, greedy: list[int]) -> None:
        assert tokens(client, 5, logit_bias={"200": 100}) == [200] * 5
        assert greedy[0] not in tokens(client, logit_bias={str(greedy[0]): -100})

    def test_a_small_bias_is_added(
        self, client: OpenAI, oracle: Oracle, prompt_ids: list[int], greedy: list[int]
    ) -> None:
        biases = dict.fromkeys(range(100, 140), 1.5)
        expected = oracle.greedy_with(prompt_ids, NUM_TOKENS, bias(biases))
        assert expected != greedy
        assert tokens(client, logit_bias={str(k): v for k, v in biases.items()}) == expected


class TestSampling:
    def test_the_same_seed_gives_the_same_answer(self, client: OpenAI) -> None:
        assert tokens(client, seed=7, temperature=1) == tokens(client, seed=7, temperature=1)

    def test_other_seeds_or_none_give_others(self, client: OpenAI) -> None:
        answers = [tokens(client, seed=seed, temperature=1) for seed in (1, 2, 3, None, None, None)]
        assert len(set(map(tuple, answers))) == 6

    def test_choices_differ_and_the_first_does_not_depend_on_their_number(self, client: OpenAI) -> None:
        settings: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "seed": 5, "max_tokens": 12}
        three, one = (client.completions.create(**settings, n=n).choices for n in (3, 1))
        assert len({choice.text for choice in three}) == 3
        assert three[0].text == one[0].text

    def test_best_of_may_repeat_n(self, client: OpenAI) -> None:
        answer = client.completions.create(model=MODEL, prompt=PROMPT, n=2, best_of=2, max_tokens=2)
        assert len(answer.choices) == 2

    @pytest.mark.parametrize(
        ("fields", "extra"),
        [({"top_p": 1e-6}, {}), ({}, {"top_k": 1}), ({}, {"min_p": 1.0})],
        ids=["top_p", "top_k", "min_p"],
    )
    def test_the_narrowest_choice_is_greedy(
        self, client: OpenAI, greedy: list[int], fields: dict[str, float], extra: dict[str, float]
    ) -> None:
        assert tokens(client, temperature=5, extra=extra, **fields) == greedy

    @pytest.mark.parametrize("name", ["top_k", "top_p", "min_p"])
    def test_what_a_rule_excludes_is_never_drawn(
        self, client: OpenAI, oracle: Oracle, prompt_ids: list[int], name: str
    ) -> None:
        extra: dict[str, Any] = {"top_k": 3, "top_p": 0.6, "min_p": 0.2}
        drawn = tokens(client, 60, extra={name: extra[name]}, temperature=1, seed=3)
        probs_TV = oracle.logprobs(prompt_ids + drawn)[len(prompt_ids) - 1 : -1].exp()
        ranks = []
        for probs_V, token in zip(probs_TV, drawn, strict=True):
            above = probs_V[probs_V > probs_V[token]]
            ranks.append(len(above))
            assert name != "top_k" or len(above) < 3
            assert name != "top_p" or above.sum() < 0.6 + 1e-4
            assert name != "min_p" or probs_V[token] >= 0.2 * probs_V.max() - 1e-6
        assert 0 < sum(rank > 0 for rank in ranks) < len(ranks), "neither greedy nor blind"

    def test_a_high_temperature_flattens(self, client: OpenAI, oracle: Oracle, prompt_ids: list[int]) -> None:
        def mean_score(temperature: float) -> float:
            drawn = tokens(client, 60, temperature=temperature, seed=3)
            return sum(oracle.scores(prompt_ids + drawn)[-60:]) / 60

        assert mean_score(50) < mean_score(1) - 1 < mean_score(0) - 2


class TestStopping:
    def stop_of(self, text: str) -> str:
        """Two characters from the middle of the greedy text that stand nowhere before."""
        return next(text[i : i + 2] for i in range(4, len(text)) if text.find(text[i : i + 2]) == i)

    def test_a_stop_string_cuts_the_text(self, client: OpenAI, text: str) -> None:
        stop = self.stop_of(text)
        settings: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "temperature": 0, "max_tokens": NUM_TOKENS}
        for stops, include in ((stop, False), (["nowhere", stop], False), (stop, True)):
            extra = {"ignore_eos": True, "include_stop_str_in_output": include}
            answer = client.completions.create(**settings, stop=stops, extra_body=extra)
            [choice] = answer.choices
            assert choice.text == text.split(stop)[0] + (stop if include else "")
            assert (choice.finish_reason, (choice.model_extra or {})["stop_reason"]) == ("stop", stop)
            assert answer.usage is not None
            assert answer.usage.completion_tokens < NUM_TOKENS

    def test_streams_never_show_a_part_of_a_stop_string(self, client: OpenAI, text: str) -> None:
        stop = self.stop_of(text)
        with client.completions.create(
            model=MODEL, prompt=PROMPT, temperature=0, max_tokens=NUM_TOKENS, stop=stop, stream=True,
            extra_body={"ignore_eos": True},
        ) as stream:  # fmt: skip
            shown = "".join(chunk.choices[0].text for chunk in stream)
        assert shown == text.split(stop)[0]

    def test_a_stop_token_ends_the_text_and_is_no_part_of_it(
        self, client: OpenAI, oracle: Oracle, greedy: list[int]
    ) -> None:
        token = next(t for i, t in enumerate(greedy) if i > 3 and greedy.index(t) == i)
        kept = greedy[: greedy.index(token)]
        extra = {"stop_token_ids": [token], "ignore_eos": True, "return_token_ids": True}
        answer = client.completions.create(
            model=MODEL, prompt=PROMPT, temperature=0, max_tokens=NUM_TOKENS, extra_body=extra
        )
        [choice] = answer.choices
        more = choice.model_extra or {}
        assert (choice.finish_reason, more["stop_reason"], more["token_ids"]) == ("stop", token, [*kept, token])
        assert choice.text == oracle.decode(kept)

    def test_end_of_sequence_stops_but_not_before_min_tokens(self, client: OpenAI) -> None:
        for extra, length in (({}, 1), ({"min_tokens": 4}, 5), ({"ignore_eos": True}, 8)):
            answer = client.completions.create(
                model=MODEL, prompt=PROMPT, temperature=0, max_tokens=8, logit_bias={str(EOS): 100}, extra_body=extra
            )
            assert answer.usage is not None
            assert answer.usage.completion_tokens == length
            assert answer.choices[0].finish_reason == ("length" if length == 8 else "stop")
