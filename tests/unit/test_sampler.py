"""Each sampling rule against its definition."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.engine import sampler
from actors.engine.sampler import adjust, sample, token_logprobs, uniform
from actors.engine.sequence import Sequence
from cluster.messages.requests import GenerationRequest, SamplingParams

PROBS = torch.tensor([0.4, 0.05, 0.3, 0.15, 0.1])
LOGITS = PROBS.log()


def sequence(prompt: tuple[int, ...] = (0,), output: tuple[int, ...] = (), **params: Any) -> Sequence:
    return Sequence.of(GenerationRequest("a", "test", prompt, SamplingParams(**params), output))


def draw(logits_V: torch.Tensor, params: SamplingParams, u: float) -> int:
    return sampler.draw(logits_V[None], {0: (params, u)})[0]


def sample_one(logits_V: torch.Tensor, one: Sequence) -> int:
    return sample(logits_V[None], [one])[0]


def support(**params: Any) -> set[int]:
    """Tokens that can be drawn."""
    return {draw(LOGITS, SamplingParams(**params), u / 1000) for u in range(1000)}


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, {0, 1, 2, 3, 4}),
        ({"top_k": 2}, {0, 2}),
        ({"top_p": 0.4}, {0}),
        ({"top_p": 0.41}, {0, 2}),
        ({"top_p": 0.9}, {0, 2, 3, 4}),
        ({"top_p": 1e-9}, {0}),
        ({"min_p": 0.3}, {0, 2, 3}),
        ({"min_p": 1.0}, {0}),
        ({"top_k": 3, "top_p": 0.8}, {0, 2}),  # 0.4 and 0.3 are 82 % of the three that top-k leaves
        ({"min_p": 0.3, "top_p": 0.8}, {0, 2}),
        ({"temperature": 0.01}, {0}),
    ],
)
def test_filters_leave_exactly_these_tokens(params: dict[str, Any], expected: set[int]) -> None:
    assert support(**params) == expected


@pytest.mark.parametrize("params", [{}, {"top_p": 0.9}, {"top_k": 3}, {"temperature": 2.0}, {"min_p": 0.2}])
def test_frequencies_follow_the_distribution(params: dict[str, Any]) -> None:
    settings_ = SamplingParams(**params)
    drawn = torch.tensor([draw(LOGITS, settings_, (i + 0.5) / 4000) for i in range(4000)])
    frequencies = drawn.bincount(minlength=5) / 4000
    allowed = torch.tensor([i in support(**params) for i in range(5)])
    wanted = (LOGITS / settings_.temperature).softmax(-1) * allowed
    assert torch.allclose(frequencies, (wanted / wanted.sum()).float(), atol=1e-3)


def test_a_nucleus_larger_than_the_first_guess_is_found() -> None:
    logits = torch.zeros(5000)
    drawn = {draw(logits, SamplingParams(top_p=0.999), u / 997) for u in range(997)}
    assert len(drawn) > 900


def test_randomness_depends_on_seed_and_position_only() -> None:
    assert uniform(1, 5) == uniform(1, 5)
    values = [uniform(seed, position) for seed in range(40) for position in range(40)]
    assert len(set(values)) == 1600
    assert all(0 <= v < 1 for v in values)
    assert math.isclose(sum(values) / 1600, 0.5, abs_tol=0.03)


@given(st.floats(0, 1, exclude_max=True), st.floats(0.01, 1), st.integers(0, 6), st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_a_drawn_token_is_always_allowed(u: float, top_p: float, top_k: int, min_p: float) -> None:
    logits = torch.tensor([-math.inf, 2.0, 1.0, -math.inf, 0.5])
    params = SamplingParams(top_p=top_p, top_k=top_k, min_p=min_p)
    assert draw(logits, params, u) in {1, 2, 4}
    assert draw(logits, params, 1 - 2**-53) in {1, 2, 4}


def test_logit_bias_moves_the_choice() -> None:
    biased = sequence(temperature=0.0, logit_bias=((1, 100.0),))
    banned = sequence(temperature=0.0, logit_bias=((0, -100.0),))
    assert sample(torch.stack([LOGITS, LOGITS]), [biased, banned]) == [1, 2]


def test_repetition_penalty_counts_prompt_and_output() -> None:
    logits = torch.tensor([2.0, 1.9, 1.8, -1.0])
    assert sample_one(logits, sequence((0,), (), temperature=0.0, repetition_penalty=2.0)) == 1
    assert sample_one(logits, sequence((0,), (1,), temperature=0.0, repetition_penalty=2.0)) == 2


def test_frequency_and_presence_penalties_count_the_output_only() -> None:
    logits = torch.tensor([2.0, 1.5, 1.0])
    assert sample_one(logits, sequence((0, 0, 0), (), temperature=0.0, presence_penalty=2.0)) == 0
    assert sample_one(logits, sequence((2,), (0,), temperature=0.0, presence_penalty=1.0)) == 1
    assert sample_one(logits, sequence((2,), (0, 0), temperature=0.0, frequency_penalty=0.2)) == 0
    assert sample_one(logits, sequence((2,), (0, 0, 0), temperature=0.0, frequency_penalty=0.2)) == 1


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=6),
    st.lists(st.lists(st.integers(0, 4), max_size=4), max_size=4),
    st.sampled_from([1.0, 0.5, 1.7]),
    st.sampled_from([0.0, 0.3]),
    st.sampled_from([0.0, -0.7]),
)
@settings(deadline=None)
def test_what_is_kept_from_step_to_step_follows_the_sequence(
    prompt: list[int], growth: list[list[int]], repetition: float, frequency: float, presence: float
) -> None:
    """The rules word by word, over the whole sequence each time, are the oracle."""
    one = sequence(
        tuple(prompt), repetition_penalty=repetition, frequency_penalty=frequency, presence_penalty=presence,
        logit_bias=((3, 0.5),), min_tokens=3, stop_token_ids=(1,),
    )  # fmt: skip
    for new in [[], *growth]:
        one.token_ids += new
        output = one.token_ids[len(prompt) :]
        expected = []
        for token, logit in enumerate(LOGITS.tolist()):
            value = logit + 0.5 * (token == 3)
            if token in one.token_ids:
                value = value / repetition if value > 0 else value * repetition
            value -= frequency * output.count(token) + presence * (token in output)
            expected.append(-math.inf if token == 1 and len(output) < 3 else value)
        assert adjust(LOGITS, one).tolist() == pytest.approx(expected, rel=1e-5)


def test_adjusting_leaves_the_model_s_logits_alone() -> None:
    logits = LOGITS.clone()
    sample_one(logits, sequence(temperature=0.0, logit_bias=((1, 100.0),), repetition_penalty=2.0))
    assert torch.equal(logits, LOGITS)


def test_token_logprob_reports_rank_and_alternatives() -> None:
    scored, other = token_logprobs(torch.stack([LOGITS, LOGITS]), [3, 0], [2, 0])
    assert (other.token_id, other.rank, other.top) == (0, 1, ())
    assert scored.rank == 3
    assert scored.logprob == pytest.approx(math.log(0.15))
    assert [token for token, _ in scored.top] == [0, 2]


RULES = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 1.7]),
        "top_k": st.sampled_from([0, 1, 3, 40, 2000]),
        "top_p": st.sampled_from([0.05, 0.7, 0.999, 1.0]),
        "min_p": st.sampled_from([0.0, 0.1]),
        "seed": st.integers(0, 2**40),
        "logit_bias": st.sampled_from([(), ((1, 2.0),)]),
        "logprobs": st.sampled_from([None, 0, 3]),
    }
)


@given(st.lists(RULES, min_size=1, max_size=6), st.sampled_from([5, 3000]), st.booleans(), st.integers(0, 9))
@settings(deadline=None, max_examples=60)
def test_a_row_does_not_depend_on_its_company(
    rules: list[dict[str, Any]], size: int, has_ties: bool, seed: int
) -> None:
    logits = torch.randn(len(rules), size, generator=torch.Generator().manual_seed(seed))
    logits = logits.bfloat16().float() if has_ties else logits
    sequences = [sequence((0,), (2,) * row, **each) for row, each in enumerate(rules)]
    alone = [sample_one(row, one) for row, one in zip(logits, sequences, strict=True)]
    assert sample(logits, sequences) == alone
    num_top = [each["logprobs"] or 0 for each in rules]
    together = token_logprobs(logits.log_softmax(-1), alone, num_top)
    for row, (token, n) in enumerate(zip(alone, num_top, strict=True)):
        (scored,) = token_logprobs(logits[row : row + 1].log_softmax(-1), [token], [n])
        assert (scored.logprob, scored.rank, len(scored.top)) == (
            together[row].logprob, together[row].rank, len(together[row].top)
        )  # fmt: skip
        assert scored.top == together[row].top


@given(RULES, st.integers(0, 9))
@settings(deadline=None, max_examples=60)
def test_a_draw_is_what_its_definition_says(rules: dict[str, Any], seed: int) -> None:
    """One token after the other, the likeliest first, in plain Python."""
    logits = torch.randn(50, generator=torch.Generator().manual_seed(seed)).double()
    params = SamplingParams(**rules | {"temperature": rules["temperature"] or 1.0})
    probs = (logits / params.temperature).softmax(-1).tolist()
    order = sorted(range(50), key=lambda token: -probs[token])[: params.top_k or 50]
    order = [token for token in order if probs[token] >= params.min_p * max(probs)]
    mass, kept = 0.0, []
    for token in order:
        if params.top_p < 1 and mass >= params.top_p * sum(probs[t] for t in order):
            break
        kept.append(token)
        mass += probs[token]
    u, reached = uniform(params.seed, 7), 0.0
    if params.top_p >= 1 and not 0 < params.top_k < 50:
        kept.sort()
    for token in kept:
        reached += probs[token]
        if reached > u * mass:
            break
    assert draw(logits.float(), params, u) == token or abs(reached - u * mass) < 1e-6


@pytest.mark.parametrize(
    "rules", [{"top_p": 0.95}, {"top_p": 0.6, "min_p": 0.001}, {"top_p": 0.999, "temperature": 1.5}]
)
def test_the_guess_at_a_nucleus_changes_nothing(rules: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(3000, generator=torch.Generator().manual_seed(3))
    params = SamplingParams(**rules)
    drawn = []
    for guess in (10, 1024, 3000):
        monkeypatch.setattr(sampler, "NUCLEUS_GUESS", guess)
        drawn.append([draw(logits, params, u / 301) for u in range(301)])
    assert drawn[0] == drawn[1] == drawn[2]


def test_the_first_of_equal_tokens_is_the_same_by_top_k_and_by_greed() -> None:
    for seed in range(40):
        logits = torch.randn(4000, generator=torch.Generator().manual_seed(seed)).bfloat16().float()
        greedy = sample_one(logits, sequence(temperature=0.0))
        assert logits[sample_one(logits, sequence(temperature=1.0, top_k=1))] == logits[greedy]
